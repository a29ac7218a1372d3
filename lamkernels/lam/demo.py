"""``lamkernels demo``: one training of the reference LAM, twice: with the stock bottleneck and with the fused one."""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamkernels.backend import resolve
from lamkernels.lam import compare, measure, metrics
from lamkernels.lam.commands import device_named
from lamkernels.lam.data import GAMES, DataConfig, load_frames
from lamkernels.lam.files import write_text
from lamkernels.lam.model import LAMConfig
from lamkernels.lam.stock import StockVectorQuantize
from lamkernels.lam.train import TrainConfig, Trainer
from lamkernels.nn import VectorQuantize

SCHEMA = "lamkernels demo 2"
HELD_OUT = 0.2  # of the transitions, the last ones played: neither the model nor the probe is fitted on them
KINDS = {"stock": "stock-vq", "fused": "vq"}
BATCH = 32
ENCODE_BATCH = 256


@dataclass(frozen=True)
class Size:
    """How much the demonstration does.

    Attributes:
        transitions: frame pairs to collect; a fifth is held out.
        steps: of each training run, in float64: there the two must be one run but for rounding.
        timed_steps: of each run in float32, as users train: the step times come from these.
        repeats: timed rounds of the bottlenecks at the training shape.
        tokenizer_rows: N of the tokenizer-like shape; K is 1024.
    """

    transitions: int
    steps: int
    timed_steps: int
    repeats: int
    tokenizer_rows: int


FULL = Size(transitions=12_600, steps=500, timed_steps=120, repeats=200, tokenizer_rows=16_384)
QUICK = Size(transitions=2_500, steps=80, timed_steps=40, repeats=50, tokenizer_rows=8_192)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns its exit status: 0 when it ran, whatever it found."""
    parser = argparse.ArgumentParser(
        prog="lamkernels demo",
        description="Trains the reference latent action model on Atari frames twice from one seed, with the stock and "
        "with the fused bottleneck; writes report.html and results.json.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer frames and steps: under a minute")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: ./demo-out")
    parser.add_argument("--game", choices=GAMES, default=DataConfig.game, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the frames and of both runs; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]; default: %(default)s")
    options = parser.parse_args(argv)
    try:
        device = device_named(options.device)
    except ValueError as error:
        parser.error(str(error))
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; it must be at least 0")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces every start and stop on stderr
    try:
        run(QUICK if options.quick else FULL, options.game, options.seed, device, options.out)
    except OSError as error:
        print(f"lamkernels demo: {error}", file=sys.stderr)
        return 1
    return 0


def run(size: Size, game: str, seed: int, device: torch.device, out: Path) -> dict[str, Any]:
    """Collects, trains, measures, and writes ``report.html`` and ``results.json`` to the folder ``out``.

    Returns:
        What ``results.json`` holds.

    Raises:
        ModuleNotFoundError: a package of the extra ``demo`` is missing.
        OSError: a file cannot be written.
    """
    from lamkernels.lam import report

    out.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    data = load_frames(DataConfig(game=game, transitions=size.transitions, seed=seed), progress=True)
    pairs = data.pairs
    held_out = len(pairs) - round(HELD_OUT * len(pairs))
    train_pairs, test_pairs = pairs[:held_out], pairs[held_out:]
    clock.lap("collect")

    model_config = LAMConfig()
    train_config = TrainConfig(steps=size.steps, batch_size=BATCH, seed=seed, dtype="float64")

    def pair_of(config: TrainConfig) -> dict[str, Trainer]:
        return {
            name: Trainer(replace(model_config, bottleneck=kind), data, config, pairs=train_pairs, device=device)
            for name, kind in KINDS.items()
        }

    trainers, timed = pair_of(train_config), pair_of(replace(train_config, steps=size.timed_steps, dtype="float32"))
    same_start = _same_state(trainers["stock"], trainers["fused"])
    with compare.reproducible():
        compare.train_in_turn(trainers)
        clock.lap("train")
        step_times = compare.train_in_turn(timed)
        clock.lap("time")
        rows = _rows(trainers["stock"])
        stock, fused = (trainer.model.bottleneck for trainer in trainers.values())
        at_one_state = compare.bottleneck_agreement(stock, fused, rows)
    for name, trainer in trainers.items():
        trainer.save(out / f"{name}.safetensors")

    costs = _costs(trainers, rows, size)
    clock.lap("measure")
    codes = {name: _codes(trainer, pairs) for name, trainer in trainers.items()}
    actions = data.actions[pairs]
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "device": _describe_device(device),
        "versions": _versions(),
        "config": {
            "quick": size == QUICK,
            "size": asdict(size),
            "data": asdict(data.config),
            "model": asdict(model_config),
            "training": asdict(train_config),
            "fused_backend": resolve("auto", device.type),
        },
        "data": {
            "trained_transitions": len(train_pairs),
            "held_out_transitions": len(test_pairs),
            "episodes": int(data.starts.sum()),
            "action_share": dict(zip(data.action_names, _shares(actions, len(data.action_names)), strict=True)),
        },
        "agreement": {
            "same_initial_state": same_start,
            "curves": compare.curve_agreement(*(trainer.curve() for trainer in trainers.values())),
            "float32_curves": compare.curve_agreement(*(trainer.curve() for trainer in timed.values())),
            "one_bottleneck_step_relative": at_one_state,
            "held_out_code_agreement": float((codes["stock"] == codes["fused"])[held_out:].double().mean()),
        },
        "step_time_ms": {name: compare.step_time_ms(times) for name, times in step_times.items()},
        "bottleneck": costs,
        "code_usage": {name: _usage(trainers[name], indices[held_out:]) for name, indices in codes.items()},
        "action_recovery": {
            name: _recovery(trainers[name], indices, actions, held_out) for name, indices in codes.items()
        },
        "curves": _curves(trainers),
        "float32_curves": _curves(timed),
    }
    clock.lap("evaluate")
    html = report.render(results, trainers["fused"], codes["fused"], pairs, held_out)
    clock.lap("report")
    results["wall_time_s"] = clock.laps | {"total": sum(clock.laps.values())}
    write_text(out / "report.html", html)
    write_text(out / "results.json", json.dumps(results, indent=1))
    _print_summary(results, out)
    return results


def _costs(trainers: dict[str, Trainer], rows: Tensor, size: Size) -> dict[str, Any]:
    training = {name: copy.deepcopy(trainer.model.bottleneck).float() for name, trainer in trainers.items()}
    rows = rows.float()
    dim, num_codes = rows.shape[-1], 1024
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(size.tokenizer_rows, dim, generator=generator).to(rows.device)
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        large = {
            "stock": StockVectorQuantize(dim, num_codes).to(rows.device),
            "fused": VectorQuantize(dim, num_codes).to(rows.device),
        }
        codebook_size = trainers["fused"].model_config.codebook_size
        return {
            "training_shape": {
                "rows": rows.shape[:-1].numel(), "dim": dim, "codebook_size": codebook_size,
                **measure.bottleneck_costs(training, rows, repeats=size.repeats),
            },
            "tokenizer_shape": {
                "rows": len(many), "dim": dim, "codebook_size": num_codes,
                **measure.bottleneck_costs(large, many, repeats=7, budget_s=8.0),
            },
        }  # fmt: skip


@torch.no_grad()
def _rows(trainer: Trainer) -> Tensor:
    """What the encoder hands the bottleneck for a training batch: (B, tokens, D)."""
    frame, next_frame = (frame.double() / 255 for frame in trainer.batch(0))
    rows: Tensor = trainer.model.eval().inverse_dynamics(frame, next_frame)
    return rows


@torch.no_grad()
def _codes(trainer: Trainer, pairs: Tensor) -> Tensor:
    """(P, tokens) int64 on the CPU: the codes of all transitions."""
    trainer.model.eval()
    codes = []
    for first in torch.split(pairs, ENCODE_BATCH):
        frames, next_frames = (trainer.data.frames[i].to(trainer.device) for i in (first, first + 1))
        _, indices = trainer.model.encode(frames, next_frames)
        assert indices is not None
        codes.append(indices.cpu())
    return torch.cat(codes)


def _curves(trainers: dict[str, Trainer]) -> dict[str, dict[str, list[float]]]:
    return {name: {kind: run.curve(kind).tolist() for kind in run.losses} for name, run in trainers.items()}


def _usage(trainer: Trainer, codes: Tensor) -> dict[str, Any]:
    usage = metrics.code_usage(codes, trainer.model_config.codebook_size)
    return asdict(usage) | {"counts": usage.counts.tolist(), "codebook_size": trainer.model_config.codebook_size}


def _recovery(trainer: Trainer, codes: Tensor, actions: Tensor, held_out: int) -> dict[str, Any]:
    features = metrics.one_hot_codes(codes, trainer.model_config.codebook_size)
    result = metrics.linear_probe(features[:held_out], actions[:held_out], features[held_out:], actions[held_out:])
    return asdict(result) | {"confusion": result.confusion.tolist(), "action_names": trainer.data.action_names}


def _shares(labels: Tensor, classes: int) -> list[float]:
    counts: list[float] = (torch.bincount(labels, minlength=classes).double() / len(labels)).tolist()
    return counts


def _same_state(first: Trainer, second: Trainer) -> bool:
    a, b = first.model.state_dict(), second.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _describe_device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device), "threads": torch.get_num_threads()}
    return {"type": "cpu", "name": measure.processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _versions() -> dict[str, str]:
    packages = ("lamkernels", "torch", "numba", "numpy", "ale-py", "matplotlib")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


class _Clock:
    """Wall time by stage, s."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def _print_summary(results: dict[str, Any], out: Path) -> None:
    from lamkernels.lam.report import headline

    curves = results["curves"]
    steps = len(curves["stock"]["loss"])
    print(f"\n{'step':>6}  {'stock loss':>12}  {'fused loss':>12}  {'relative difference':>20}")
    for step in sorted({round(i * (steps - 1) / 10) for i in range(11)}):
        a, b = curves["stock"]["loss"][step], curves["fused"]["loss"][step]
        print(f"{step + 1:6}  {a:12.6f}  {b:12.6f}  {abs(a - b) / max(abs(a), 1e-12):20.1e}")
    print(f"\n{'':34}  {'stock':>14}  {'fused':>14}  {'ratio':>8}")
    for row in headline(results):
        print(f"{row.name:34}  {row.stock:>14}  {row.fused:>14}  {row.ratio:>8}")
    print(f"\n{results['wall_time_s']['total']:.0f} s in all. {out / 'report.html'}, {out / 'results.json'}")
