"""Where the time of a training step goes: the share of each part, with the stock and with the fused bottleneck.

``python -m lamkernels.lam.throughput --out DIR`` writes ``throughput.json`` and prints a table. A step is taken apart
at the borders of its parts: each gets its input as a leaf, and its backward the gradient that the next one left, so
that forward and backward of a part are timed together and the sum of the parts is the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lamkernels.lam.commands import device_named
from lamkernels.lam.data import FrameData
from lamkernels.lam.files import write_text
from lamkernels.lam.measure import processor, seconds, synchronize
from lamkernels.lam.model import LAMConfig
from lamkernels.lam.objectives import relative_motion_error
from lamkernels.lam.train import TrainConfig, Trainer

PARTS = ("data", "inverse dynamics", "bottleneck", "forward model", "loss", "optimiser")
KINDS = {"stock": "stock-vq", "fused": "vq"}
WARM_UP, FRAMES = 3, 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lamkernels.lam.throughput",
        description="Times the parts of a training step of the reference LAM, with the stock and the fused bottleneck.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("throughput-out"), metavar="DIR", help="default: %(default)s")
    add("--device", default="cpu", help="cpu or cuda[:N]; default: %(default)s")
    add("--batch-size", type=int, default=64, metavar="B", help="default: %(default)s")
    add("--tokens", type=int, default=4, help="latent tokens of a pair; default: %(default)s")
    add("--latent-dim", type=int, default=32, metavar="D", help="of a token; default: %(default)s")
    add("--codebook-size", type=int, default=8, metavar="K", help="codes; default: %(default)s")
    add("--steps", type=int, default=20, help="timed steps of either variant; default: %(default)s")
    add("--amp", action="store_true", help="autocast to bfloat16")
    options = parser.parse_args(argv)
    try:
        device = device_named(options.device)
        model = LAMConfig(tokens=options.tokens, latent_dim=options.latent_dim, codebook_size=options.codebook_size)
        training = TrainConfig(steps=2 * (WARM_UP + options.steps), batch_size=options.batch_size, amp=options.amp)
        results = measure(model, training, options.steps, device)
    except ValueError as error:
        parser.error(str(error))
    print(table(results))
    try:
        write_text(options.out / "throughput.json", json.dumps(results, indent=1) + "\n")
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def measure(model: LAMConfig, training: TrainConfig, steps: int, device: torch.device | str) -> dict[str, Any]:
    """Times whole steps, and steps in parts, of both variants in turn, on noise: no part's time depends on the pixels.

    Args:
        model: its shape; the bottleneck is replaced.
        training: of 2 · (3 + steps) steps or more.
        steps: timed, of each variant and kind.
        device: of the model.

    Returns:
        JSON: the configuration; by variant "step_ms" (median and quartiles of whole steps), "steps_per_s",
        "pairs_per_s", "parts_ms" (medians, forward and backward together) and "share" of their sum.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(
        256, (FRAMES, model.channels, model.size, model.size), generator=generator, dtype=torch.uint8
    )
    data = FrameData(frames, torch.full((FRAMES,), -1), torch.arange(FRAMES) == 0, (), training)
    trainers = {
        name: Trainer(replace(model, bottleneck=kind), data, training, device=device) for name, kind in KINDS.items()
    }
    whole: dict[str, list[float]] = {name: [] for name in KINDS}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in KINDS}
    for number in range(WARM_UP + steps):
        for name in list(KINDS) if number % 2 else reversed(list(KINDS)):
            elapsed = seconds(trainers[name].train_step, device)
            taken_apart = step_in_parts(trainers[name])
            if number >= WARM_UP:
                whole[name].append(elapsed)
                parts[name].append(taken_apart)
    found = {}
    for name in KINDS:
        times = {part: 1e3 * statistics.median(step[part] for step in parts[name]) for part in PARTS}
        median = statistics.median(whole[name])
        low, _, high = statistics.quantiles(whole[name], n=4)
        found[name] = {
            "step_ms": {"median": 1e3 * median, "lower_quartile": 1e3 * low, "upper_quartile": 1e3 * high},
            "steps_per_s": 1 / median,
            "pairs_per_s": training.batch_size / median,
            "parts_ms": times,
            "share": {part: value / sum(times.values()) for part, value in times.items()},
        }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "schema": "lamkernels throughput 1",
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "model": asdict(model),
        "training": asdict(training),
        "steps": steps,
        "variants": found,
    }


def step_in_parts(trainer: Trainer) -> dict[str, float]:
    """One optimiser step, that of :meth:`Trainer.train_step` on one process, part by part; the seconds of each."""
    with trainer.own_rng():
        return _step_in_parts(trainer)


def _step_in_parts(trainer: Trainer) -> dict[str, float]:
    trainer.set_learning_rate()
    model, device, clock = trainer.model.train(), trainer.device, _Clock(trainer.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=trainer.config.amp)
    frame, next_frame = (pixels.to(trainer.model.inverse_dynamics.head.weight.dtype) / 255
                         for pixels in trainer.batch(trainer.step))  # fmt: skip
    clock.lap("data")
    with autocast:
        x = model.inverse_dynamics(frame, next_frame)
    clock.lap("inverse dynamics")
    x_leaf = x.detach().requires_grad_()
    with autocast:
        latent, _, bottleneck_loss = model.bottleneck(x_leaf)
    clock.lap("bottleneck")
    latent_leaf = latent.detach().requires_grad_()
    with autocast:
        prediction = frame + model.forward_model(frame, latent_leaf)
    clock.lap("forward model")
    prediction_leaf = prediction.detach().requires_grad_()
    loss = relative_motion_error(prediction_leaf, next_frame, frame, model.config.motion_weight)
    loss.backward()  # type: ignore[no-untyped-call]
    clock.lap("loss")
    trainer.optimizer.zero_grad(set_to_none=True)
    clock.lap("optimiser")
    prediction.backward(prediction_leaf.grad)
    clock.lap("forward model")
    torch.autograd.backward([latent, bottleneck_loss], [latent_leaf.grad, torch.ones_like(bottleneck_loss)])
    clock.lap("bottleneck")
    x.backward(x_leaf.grad)
    clock.lap("inverse dynamics")
    trainer.optimizer.step()
    clock.lap("optimiser")
    trainer.step += 1
    return clock.seconds


class _Clock:
    """Seconds by part; what the device was given to do is waited for at every border."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)
        synchronize(device)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def table(results: dict[str, Any]) -> str:
    """Parts by variant, and the step as a whole."""
    variants = results["variants"]
    lines = [f"{'part':18}" + "".join(f"{name + ', ms':>12}{'share':>8}" for name in variants)]
    for part in PARTS:
        columns = (f"{found['parts_ms'][part]:12.3f}{found['share'][part]:8.1%}" for found in variants.values())
        lines.append(f"{part:18}" + "".join(columns))
    whole = (f"{found['step_ms']['median']:12.3f}{'':8}" for found in variants.values())
    lines.append(f"{'whole step':18}" + "".join(whole))
    lines.append("pairs per second: " + ", ".join(f"{name} {v['pairs_per_s']:.0f}" for name, v in variants.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
