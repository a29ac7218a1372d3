"""Labelling a data set with latent actions, beside the pattern it replaces: one pair at a time in a data transform."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import lamkernels as lk
from lamkernels.lam import LAMConfig, LinearLAM, Source
from lamkernels.lam.model import InverseDynamics

ENCODERS = ("linear", "features", "frames")
NEAR_TIE = 1e-4  # codes may differ where the squared distances do by less, relatively: encoders round by the batch


class Labelling(NamedTuple):
    """Microseconds per pair, medians; the file is read and the shards are written in ``label``.

    Attributes:
        encoder: "linear", "features" or "frames"; see :func:`case`.
        pairs: in the file; the pattern is timed on the first ``compared`` of them.
        compared: pairs whose codes were compared.
        unequal: those with another code in some slot.
        wrong: those of them that are no near tie.
        pattern: the encoder at batch 1, cdist, argmin and an ``.item()`` a code, on the faster of 1 and all threads,
            from arrays in memory.
        label: :func:`lamkernels.label`, from the file to the shards.
        encoder_only: the encoder alone at the same batch size: what no labelling can undercut.
    """

    encoder: str
    pairs: int
    compared: int
    unequal: int
    wrong: int
    pattern: float
    label: float
    encoder_only: float

    @property
    def speedup(self) -> float:
        """The pattern's time over that of ``label``."""
        return self.pattern / self.label


class Case(NamedTuple):
    """Observations (T, ...), an encoder (B, ...) × 2 -> (B, S, D) and its codebook (K, D)."""

    observations: np.ndarray
    encoder: Callable[[Tensor, Tensor], Tensor]
    codebook: Tensor


class Features(nn.Module):
    """Two feature vectors of 768 entries, as of a ViT-B, -> (B, 4, 128), the slots of UniVLA."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * 768, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4 * 128)
        )

    def forward(self, o: Tensor, o_next: Tensor) -> Tensor:
        rows: Tensor = self.layers(torch.cat([o, o_next], 1))
        return rows.view(-1, 4, 128)


def case(name: str, rows: int) -> Case:
    """Makes one of three cases, with codes that are rows of the encoder.

    "linear": the linear LAM of 16 × 16 pixels, as ``lamkernels fit`` makes it, and 16 codes of 8 entries. "features": a
    perceptron on features, and 16 codes of 128 entries in 4 slots. "frames": the convolutions of the reference LAM on
    64 × 64 pixels, and its 8 codes of 32 entries in 4 slots.
    """
    torch.manual_seed(0)
    if name == "frames":
        config = LAMConfig()
        observations = torch.randint(256, (rows, 3, 64, 64), dtype=torch.uint8)
        encoder: Callable[[Tensor, Tensor], Tensor] = InverseDynamics(config).eval()
        codes = config.codebook_size
    else:
        observations = torch.randn(rows, 768)
        codes = 16
        if name == "features":
            encoder = Features().eval()
        else:
            model = LinearLAM(8).fit(observations[:-1], observations[1:])

            def encoder(o: Tensor, o_next: Tensor) -> Tensor:
                return model.encode(o, o_next)[:, None]

    with torch.inference_mode():
        found = encoder(*(_pixels(observations[start : start + 256]) for start in (0, 1)))
    found = found.flatten(0, 1)
    return Case(observations.numpy(), encoder, found[torch.randperm(len(found))[:codes]].clone())


def _pixels(values: Tensor) -> Tensor:
    return values.float() / 255 if values.dtype == torch.uint8 else values


def one_by_one(given: Case, pairs: int) -> list[list[int]]:
    """The codes of the first pairs as UniVLA's data transform makes them, but for the strings of its tokens."""
    codes = []
    with torch.no_grad():
        for t in range(pairs):
            o, o_next = (_pixels(torch.from_numpy(given.observations[i]))[None] for i in (t, t + 1))
            indices = torch.cdist(given.encoder(o, o_next)[0], given.codebook).argmin(-1)
            codes.append([index.item() for index in indices])
    return codes


def labelling(name: str, *, quick: bool = False, batch_size: int = 256) -> Labelling:
    """Compares the codes, and times both on the CPU, in turns."""
    rows = (600 if quick else 4000) if name == "frames" else (2000 if quick else 100_000)
    compared, rounds = (100, 1) if quick else (1000, 3)
    given = case(name, rows)
    shape = given.observations.shape[1:]
    threads = torch.get_num_threads()
    times: dict[str, list[float]] = {"one": [], "all": [], "label": [], "encoder_only": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "observations.npz"
        np.savez(file, rows=given.observations)

        def label(out: str) -> None:
            lk.label(file, given.encoder, given.codebook, Path(folder) / out, format="safetensors", shape=shape,
                     batch_size=batch_size, progress=False)  # fmt: skip

        label("warm")
        (written,) = Source(Path(folder) / "warm" / "part-00000-00000.safetensors", rows="indices")
        ours, theirs = written.rows[:compared].long(), torch.tensor(one_by_one(given, compared))
        batch = _pixels(torch.from_numpy(given.observations[: batch_size + 1]))
        repeats = max(1, compared * 4 // batch_size)
        for turn in range(rounds):
            for kind, count in (("one", 1), ("all", threads)):
                torch.set_num_threads(count)
                one_by_one(given, 20)
                times[kind].append(_seconds(lambda: one_by_one(given, compared)) / compared)
            times["label"].append(_seconds(lambda out=f"{turn}": label(out)) / (rows - 1))  # type: ignore[misc]
            with torch.inference_mode():
                spent = _seconds(lambda: [given.encoder(batch[:-1], batch[1:]) for _ in range(repeats)])
            times["encoder_only"].append(spent / (repeats * batch_size))
    unequal = (ours != theirs).any(1)
    wrong = _wrong(given, unequal, ours, theirs)
    found = {kind: 1e6 * median(taken) for kind, taken in times.items()}
    pattern = min(found["one"], found["all"])
    return Labelling(
        name, rows - 1, compared, int(unequal.sum()), wrong, pattern, found["label"], found["encoder_only"]
    )


def _wrong(given: Case, unequal: Tensor, ours: Tensor, theirs: Tensor) -> int:
    """The pairs with unequal codes that are no near ties."""
    wrong = 0
    for t in unequal.nonzero().flatten().tolist():
        o, o_next = (_pixels(torch.from_numpy(given.observations[i : i + 1])) for i in (t, t + 1))
        with torch.inference_mode():
            x = given.encoder(o, o_next)[0].double()
        one, other = ((x - given.codebook[codes[t]].double()).square().sum(-1) for codes in (ours, theirs))
        wrong += bool(((one - other).abs() > NEAR_TIE * other).any())
    return wrong


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
