"""``python -m lamkernels.lam.collapse --out DIR``: how codebooks collapse, and what each remedy does about it.

A small autoencoder with a VQ bottleneck learns a synthetic stream, once for each remedy and seed. The command writes a
CSV with the usage and perplexity of the codebook through training, another with the last of it as means and intervals
over the seeds, and a figure; from its controls alone: the same seed, the same bytes.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.lam import collapse_figures, commands
from lamkernels.lam.experiments import to_csv
from lamkernels.lam.files import replacing, write_text
from lamkernels.nn.health import CodebookHealth
from lamkernels.nn.vector_quantize import VectorQuantize

Row = dict[str, Any]

PLAIN: dict[str, Any] = {"update": "gradient"}
REPLACED: dict[str, Any] = {"dead_code_threshold": 0.5}
REMEDIES: dict[str, dict[str, Any]] = {  # name: options of VectorQuantize; each but the last is one change to the first
    "gradient": PLAIN,
    "rotation": PLAIN | {"gradient": "rotation"},
    "cosine": PLAIN | {"metric": "cosine"},
    "k-means": PLAIN | {"init": "kmeans"},
    "EMA": {"update": "ema"},
    "dead codes": PLAIN | REPLACED,
    "EMA, k-means, dead codes": {"update": "ema", "init": "kmeans"} | REPLACED,
}
MEASURES = ("usage", "perplexity", "reconstruction_loss")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %


@dataclass(frozen=True)
class Controls:
    """Everything that the numbers depend on.

    Attributes:
        modes: of the stream; mode i comes with a probability in proportion to 1/√(i + 1).
        observation: entries of an observation: the centre of its mode, N(0, 1) in each entry, and noise.
        noise: standard deviation of the noise.
        hidden: units of encoder and decoder, which have one hidden layer each.
        dim: of the bottleneck.
        codebook_size: K.
        steps: of Adam.
        batch_size: observations of a step.
        learning_rate: of Adam.
        every: steps between two measurements, each over the steps since the one before.
        seeds: runs of each remedy, from 2 to 10.
        seed: of the first of them; the stream, the weights and the batches change with it.
    """

    modes: int = 64
    observation: int = 32
    noise: float = 0.1
    hidden: int = 64
    dim: int = 8
    codebook_size: int = 64
    steps: int = 600
    batch_size: int = 256
    learning_rate: float = 1e-3
    every: int = 30
    seeds: int = 5
    seed: int = 0

    def quick(self) -> Controls:
        """Seconds instead of minutes."""
        return replace(self, steps=120, seeds=2)


class Autoencoder(nn.Module):
    """x (B, observation) -> its reconstruction, and the loss of the bottleneck."""

    def __init__(self, controls: Controls, **options: Any) -> None:
        super().__init__()
        c = controls
        self.encoder = nn.Sequential(nn.Linear(c.observation, c.hidden), nn.GELU(), nn.Linear(c.hidden, c.dim))
        self.bottleneck = VectorQuantize(
            c.dim, c.codebook_size, commitment_weight=0.25, health=CodebookHealth(c.codebook_size), **options
        )
        self.decoder = nn.Sequential(nn.Linear(c.dim, c.hidden), nn.GELU(), nn.Linear(c.hidden, c.observation))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = self.bottleneck(self.encoder(x))
        return self.decoder(quantized), loss


def train(controls: Controls, remedy: str, seed: int) -> list[Row]:
    """The measurements of one run: a row for every ``controls.every`` steps."""
    c, generator = controls, torch.Generator().manual_seed(seed)
    centres = torch.randn(c.modes, c.observation, generator=generator)
    shares = 1 / torch.arange(1, c.modes + 1).sqrt()
    torch.manual_seed(seed)
    model = Autoencoder(c, **REMEDIES[remedy])
    health = model.bottleneck.health
    assert health is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=c.learning_rate, fused=True)
    rows, total = [], torch.zeros(())
    for step in range(1, c.steps + 1):
        mode = torch.multinomial(shares, c.batch_size, replacement=True, generator=generator)
        x = centres[mode] + c.noise * torch.randn(c.batch_size, c.observation, generator=generator)
        prediction, loss = model(x)
        reconstruction = F.mse_loss(prediction, x)
        optimizer.zero_grad()
        (reconstruction + loss).backward()
        optimizer.step()
        total += reconstruction.detach()
        if step % c.every == 0:
            report = health.read()
            rows.append(
                {
                    "remedy": remedy,
                    "seed": seed,
                    "step": step,
                    "usage": report.usage,
                    "perplexity": report.perplexity,
                    "dead_codes": report.dead_codes,
                    "replaced": report.replaced,
                    "reconstruction_loss": float(total) / c.every,
                }
            )
            health.reset()
            total.zero_()
    return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """The last measurement of each remedy: the mean over its seeds and half of its 95 % interval (Student's t)."""
    result = []
    last = max(row["step"] for row in rows)
    for remedy in dict.fromkeys(row["remedy"] for row in rows):
        own = [row for row in rows if row["remedy"] == remedy and row["step"] == last]
        found: Row = {"remedy": remedy, "seeds": len(own), "step": last}
        for measure in MEASURES:
            found[measure], found[f"{measure}_interval"] = interval([row[measure] for row in own])
        found["replaced"] = sum(row["replaced"] for row in rows if row["remedy"] == remedy) / len(own)
        result.append(found)
    return result


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of 2 to 10 values, and half of its 95 % interval."""
    return statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def run(out: Path, controls: Controls) -> None:
    """Writes ``curves.csv``, ``summary.csv`` and ``curves.png``; one thread does it, so that sums have one order.

    Args:
        out: folder.
        controls: of the runs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    commands.need("matplotlib")
    state, rows = torch.get_rng_state(), []
    try:
        with commands.one_thread():
            for remedy in REMEDIES:
                start = time.perf_counter()
                for seed in range(controls.seed, controls.seed + controls.seeds):
                    rows += train(controls, remedy, seed)
                print(f"{remedy}: {controls.seeds} runs, {time.perf_counter() - start:.1f} s")
    finally:
        torch.set_rng_state(state)
    write_text(out / "curves.csv", to_csv(rows))
    write_text(out / "summary.csv", to_csv(summary(rows)))
    with replacing(out / "curves.png") as path:
        path.write_bytes(collapse_figures.curves(rows, interval))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    parser = commands.parser(
        "lamkernels.lam.collapse",
        "Usage and perplexity of a codebook through training: curves.csv, summary.csv, curves.png.",
        "codebook-collapse",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed; default: %(default)s")
    options = parser.parse_args(argv)
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; it must be at least 0")
    controls = Controls(seed=options.seed)
    return commands.status(parser, lambda: run(options.out, controls.quick() if options.quick else controls))


if __name__ == "__main__":
    sys.exit(main())
