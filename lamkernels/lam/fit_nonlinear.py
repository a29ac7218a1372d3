"""``lamkernels fit --model nonlinear``: the reference latent action model of anyone's videos, trained and explained.

Frames are decoded once into a file in the folder of the results (:mod:`lamkernels.lam.frame_cache`), training draws
pairs from it at random and saves its state now and then, and what the latent actions do is written as a page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from lamkernels.lam.commands import device_named, need, status
from lamkernels.lam.files import save_tensors, write_text
from lamkernels.lam.fit import HELD_OUT, SEGMENT, say
from lamkernels.lam.fit_nonlinear_report import encode, measure, summary, write_page
from lamkernels.lam.frame_cache import CachedFrames, FramesConfig, cached_frames, segments
from lamkernels.lam.model import BOTTLENECKS, LAMConfig
from lamkernels.lam.sources import expanded
from lamkernels.lam.train import TrainConfig, Trainer
from lamkernels.processes import Processes, process_group

CHECKPOINT = "checkpoint-nonlinear.safetensors"
CURVE_POINTS = 1000  # of a curve in the report
ENDS = 20  # losses at the start and at the end are means over a twentieth of the steps


@dataclass(frozen=True)
class NonlinearFitConfig:
    """What decides the result, together with the data.

    Attributes:
        frames: what is read.
        model: its shape; ``size`` is that of the frames.
        training: how it is trained; a batch takes no more pairs than there are.
    """

    frames: FramesConfig
    model: LAMConfig
    training: TrainConfig

    def __post_init__(self) -> None:
        """Raises ValueError where the parts do not go together."""
        if self.model.size != self.frames.side:
            raise ValueError(f"the model's size is {self.model.size}, the side of the frames {self.frames.side}")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and writes the model, its numbers and its page; returns the exit status."""
    parser = _parser()
    options = vars(parser.parse_args(argv))
    out, restart, seconds = (options.pop(name) for name in ("out", "restart", "checkpoint_seconds"))
    try:
        device = _own_device(options["device"])
        sources = expanded(options["paths"], rows=options["rows"], camera=options["camera"])
        config = NonlinearFitConfig(
            frames=FramesConfig(sources=tuple(sources), **_chosen(FramesConfig, options)),
            model=LAMConfig(size=options["side"], **_chosen(LAMConfig, options)),
            training=TrainConfig(**_chosen(TrainConfig, options)),
        )
    except (FileNotFoundError, ValueError, TypeError) as error:
        parser.error(str(error))

    def work() -> None:
        with process_group("nccl" if device.type == "cuda" else "gloo"):
            results = fit_nonlinear(
                config, out, device=device, restart=restart, checkpoint_seconds=seconds, progress=True
            )
        if results is not None:
            say(summary(results), results, out)

    return status(parser, work)


def _own_device(name: str) -> torch.device:
    """The device of this process: of "cuda", under torchrun, the GPU with its local number."""
    local = os.environ.get("LOCAL_RANK") if name == "cuda" else None
    device = device_named(name if local is None else f"cuda:{local}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's collectives are on the current one
    return device


def _chosen(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are fields of a configuration."""
    return {field.name: options[field.name] for field in fields(kind) if field.name in options}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lamkernels fit --model nonlinear",
        description="Trains the reference latent action model on frames and writes report.html: what each latent "
        "action does to a frame, and what they say. Goes on where it was stopped; under torchrun, processes share each "
        "batch.",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help="videos, folders of them, LeRobot data sets, arrays of images, atari:GAME",
    )
    add("--model", choices=("linear", "nonlinear"), help=argparse.SUPPRESS)
    add("--steps", type=int, default=2000, help="of training; default: %(default)s")
    add("--batch-size", type=int, default=64, metavar="B", help="pairs of a step; default: %(default)s")
    add("--learning-rate", type=float, default=1e-3, metavar="R", help="at its peak; default: %(default)s")
    add("--side", type=int, default=64, help="frames are resized to so many pixels squared; default: %(default)s")
    add("--lag", type=int, default=1, metavar="H", help="frames from o to o'; default: %(default)s")
    add("--bottleneck", choices=BOTTLENECKS, default="vq", help="default: %(default)s")
    add("--tokens", type=int, default=4, help="latent tokens of a pair; default: %(default)s")
    add("--latent-dim", type=int, default=32, metavar="D", help="of a token; default: %(default)s")
    add("--codebook-size", type=int, default=8, metavar="K", help="codes; default: %(default)s")
    add("--width", type=int, default=16, metavar="W", help="channels of the first layer; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="cpu", help="cpu or cuda[:N]; default: %(default)s")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--rows", metavar="NAME", help="array or column of frames; default: rows, frames")
    add("--actions", metavar="NAME", help="the same of the actions; default: actions or action")
    add("--camera", metavar="NAME", help="of LeRobot data sets; default: the first")
    add("--num-actions", type=int, default=18, help="integer actions are below it; default: %(default)s, as Atari's")
    add("--cache-gib", type=float, default=4.0, metavar="G",
        help="frames are kept in DIR, at most so many GiB of them; default: %(default)s")  # fmt: skip
    add("--out", type=Path, default=Path("fit-out"), metavar="DIR", help="default: ./fit-out")
    add("--checkpoint-seconds", type=float, default=60.0, metavar="S", help="between checkpoints; default: %(default)s")
    add("--restart", action="store_true", help="train anew where DIR has a fit; frames are kept if they still fit")
    return parser


def fit_nonlinear(
    config: NonlinearFitConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    restart: bool = False,
    checkpoint_seconds: float = 60.0,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Reads what has not been read, trains what has not been trained, measures and writes; see the module.

    Args:
        config: what to fit.
        out: folder of the results, the frames and the checkpoint, which a fit that was stopped goes on from.
        device: of the model.
        restart: whether to forget the checkpoint, and the frames where they are of other data.
        checkpoint_seconds: between two checkpoints.
        progress: show a progress bar.

    Returns:
        What ``report.json`` holds on the first process, None on the others.

    Raises:
        ValueError: there are no frames, fewer than two pairs, or the folder holds another fit.
        OSError: a file cannot be written.
        ModuleNotFoundError: a package of the extra ``fit`` is missing.
    """
    need("jinja2", "matplotlib", "safetensors", "tqdm", what="the fit and its page", extra="fit")
    start, processes = time.perf_counter(), Processes()
    if restart and processes.rank == 0:
        (out / CHECKPOINT).unlink(
            missing_ok=True
        )  # at once: a fit that is stopped early must not go on with the old one
    cached = _frames(config, out, restart, checkpoint_seconds, processes)
    fitted, held_out, segment = split(cached)
    if len(fitted) < 2 * processes.size:
        raise ValueError(
            f"{len(fitted)} pairs of frames are in; training needs at least {2 * processes.size}. Episodes that are no "
            "longer than the lag make none"
        )
    trainer = _trained(config, cached, fitted, out, device, restart, checkpoint_seconds, progress, processes)
    if processes.rank:
        return None
    if not all(bool(weight.isfinite().all()) for weight in trainer.model.parameters()):
        raise ValueError("training diverged: weights are not finite; try a lower --learning-rate, with --restart")
    model = trainer.model.eval()
    seen, unseen = encode(model, cached, fitted), encode(model, cached, held_out)
    results: dict[str, Any] = {
        "schema": "lamkernels fit nonlinear 1",
        "config": asdict(config),
        "skipped": cached.skipped,
        "frames": len(cached.data.frames),
        "sources": len(cached.parts),
        "pairs": {"fitted": len(fitted), "held_out": len(held_out)},
        "segment": segment,
        **measure(model, cached, seen, unseen),
    }
    curves = {name: trainer.curve(name) for name in trainer.losses}
    end = max(1, trainer.step // ENDS)
    prediction = curves["reconstruction_loss"]
    results["loss"] = {"first": float(prediction[:end].mean()), "last": float(prediction[-end:].mean())}
    points = torch.linspace(0, trainer.step - 1, min(trainer.step, CURVE_POINTS)).long()
    results["curves"] = {"step": (points + 1).tolist()} | {
        name: curve[points].tolist() for name, curve in curves.items()
    }
    write_page(out / "report.html", results, model, cached, unseen if len(unseen.first) else seen, results["curves"])
    description = {"format": "lamkernels LatentActionModel", "config": json.dumps(asdict(model.config), sort_keys=True)}
    save_tensors(out / "model.safetensors", model.state_dict(), description)
    results |= {"seconds": time.perf_counter() - start, "files": ["report.html", "report.json", "model.safetensors"]}
    write_text(out / "report.json", json.dumps(results, indent=1) + "\n")
    return results


def _frames(
    config: NonlinearFitConfig, out: Path, restart: bool, checkpoint_seconds: float, processes: Processes
) -> CachedFrames:
    """The first process reads, and the others wait for it."""
    failure: list[Exception | None] = [None]
    cached = None
    if processes.rank == 0:
        try:
            cached = cached_frames(config.frames, out, restart=restart, checkpoint_seconds=checkpoint_seconds)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            failure = [error]
    if processes.size > 1:
        distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]
    return cached or cached_frames(config.frames, out, read=False)


def split(cached: CachedFrames) -> tuple[Tensor, Tensor, int]:
    """The first frames of the pairs to fit and of those held out, and the length of a segment.

    Every fifth segment of a source is held out, as in the linear fit; of few frames, segments are shorter than there.
    Pairs with one frame on either side are left out.
    """
    data, lag = cached.data, cached.data.lag
    segment = max(1, min(max(SEGMENT, 64 * lag), max(4 * lag, len(data.frames) // (4 * HELD_OUT))))
    held = segments(cached, segment, HELD_OUT)
    pairs = data.pairs
    first, second = held[pairs], held[pairs + lag]
    return pairs[~first & ~second], pairs[first & second], segment


def _trained(
    config: NonlinearFitConfig, cached: CachedFrames, pairs: Tensor, out: Path, device: torch.device | str,
    restart: bool, checkpoint_seconds: float, progress: bool, processes: Processes,
) -> Trainer:  # fmt: skip
    from tqdm import tqdm

    share = len(pairs) // processes.size * processes.size
    training = TrainConfig(**asdict(config.training) | {"batch_size": min(config.training.batch_size, share)})
    pixels = hashlib.sha256("".join(part.sha256 for part in cached.parts).encode()).hexdigest()
    trainer = Trainer(config.model, cached.data, training, pairs=pairs, device=device, data_name=pixels)
    checkpoint = out / CHECKPOINT
    if checkpoint.exists() and not restart:
        try:
            trainer.load(checkpoint)
        except ValueError as error:
            raise ValueError(f"{error}; --restart forgets it") from error
    saved = time.monotonic()
    hidden = None if progress and processes.rank == 0 else True
    with tqdm(total=training.steps, initial=trainer.step, desc="training", unit=" steps", disable=hidden) as bar:
        while trainer.step < training.steps:
            trainer.train_step()
            bar.update()
            if processes.rank == 0 and time.monotonic() - saved > checkpoint_seconds:
                trainer.save(checkpoint)
                saved = time.monotonic()
                bar.set_postfix(loss=f"{float(trainer.losses['loss'][-1]):.3f}")
    if processes.rank == 0:
        trainer.save(checkpoint)
    return trainer
