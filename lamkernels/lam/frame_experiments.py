"""``python -m lamkernels.lam.frame_experiments [names] --out DIR``: the linear analysis against networks, on frames.

Frames in front of something whose state is known (:mod:`lamkernels.lam.frame_scenes`), a small convolutional latent
action model, and beside it the closed form of the linear one on the same pixels. Each row is written when it is made,
and a run that was stopped goes on behind the last one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamkernels.lam import commands, frame_figures
from lamkernels.lam.bottlenecks import BOTTLENECKS
from lamkernels.lam.control import check_rendering
from lamkernels.lam.frame_lam import FrameLAM, FrameLAMConfig
from lamkernels.lam.frame_metrics import (
    Latents,
    controllability,
    few_label_accuracy,
    mutual_information,
    psnr,
)
from lamkernels.lam.frame_remedies import OF_MASKS, REMEDIES, WITHOUT_DECODER, train_with_remedy
from lamkernels.lam.frame_scenes import SMALLEST, GameData, Place, Scene, TaskData
from lamkernels.lam.frame_training import TrainingConfig
from lamkernels.lam.journal import Row, kept_rows, write_experiments
from lamkernels.lam.linear import LinearLAM

OF_THE_DECODER = ("prediction_error", "psnr", "delta_psnr", "delta_psnr_agent", "transfer_agent")
CHUNK = 8192  # transitions that a trained model is given at a time
LARGE_WIDTH, LARGE_STEPS, LARGE_BATCH = 32, 5000, 512


@dataclass(frozen=True)
class FrameControls:
    """Everything that a figure depends on.

    Attributes:
        data: frames, and the sweep over them.
        remedies: of :data:`lamkernels.lam.frame_remedies.REMEDIES`.
        bottlenecks: of the trained models.
        latent_dim: k, of continuous latents and of the linear model.
        code_dim: entries of a code of a codebook.
        codebook_size: K.
        width: of the convolutions.
        training: steps, batch size, learning rate.
        seeds: of the data and the training, each a model of its own.
        device: that trains.
    """

    data: GameData | TaskData = field(default_factory=GameData)
    remedies: tuple[str, ...] = ("none",)
    bottlenecks: tuple[str, ...] = ("none", "vq")
    latent_dim: int = 1
    code_dim: int = 8
    codebook_size: int = 8
    width: int = 8
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"

    def entries(self, bottleneck: str) -> int:
        """Of z. FSQ has no codebook, but levels for each entry: two of them, so that its codes are as many."""
        if bottleneck == "fsq":
            return max(1, (self.codebook_size - 1).bit_length())
        return self.latent_dim if bottleneck in ("none", "gaussian") else self.code_dim

    def quick(self) -> FrameControls:
        """Fewer points, seeds, frames and steps: seconds instead of minutes."""
        training = replace(self.training, steps=10, batch_size=32)
        return replace(self, data=self.data.quick(), training=training, seeds=self.seeds[:2])

    def large(self) -> FrameControls:
        """More and larger frames, wider models, more steps: for a GPU."""
        training = replace(self.training, steps=LARGE_STEPS, batch_size=LARGE_BATCH)
        return replace(self, data=self.data.large(), width=LARGE_WIDTH, training=training)


RATIOS = (0.125, 0.25, 0.5, 0.7, 1.4, 2.5, 6.0, 16.0)
CONTROLS = {
    "noise": FrameControls(GameData(ratio=RATIOS)),
    "dependence": FrameControls(GameData(ratio=(0.25, 4.0), coupling=(0.0, 0.4, 0.8, 1.0)), bottlenecks=("none",)),
    "remedies": FrameControls(remedies=REMEDIES),
    "pong-remedies": FrameControls(GameData("pong"), remedies=REMEDIES),
    "control-remedies": FrameControls(TaskData(), remedies=OF_MASKS, latent_dim=4),
    "bottlenecks": FrameControls(GameData(ratio=(0.25, 4.0)), bottlenecks=tuple(BOTTLENECKS)),
}
DRAW: dict[str, Callable[[list[Row]], bytes]] = {
    "noise": frame_figures.noise,
    "dependence": frame_figures.dependence,
    "remedies": frame_figures.remedies,
    "pong-remedies": frame_figures.remedies,
    "control-remedies": frame_figures.remedies,
    "bottlenecks": frame_figures.bottlenecks,
}


@dataclass(frozen=True)
class FramePoint:
    """One model: a place of the sweep, a remedy, a bottleneck ("linear" for the closed form), a seed."""

    place: Place
    remedy: str
    bottleneck: str
    seed: int


def points(controls: FrameControls) -> Iterator[FramePoint]:
    """All models of an experiment, data in the outer loops: frames are drawn once. The linear one has no remedies."""
    for seed in controls.seeds:
        for place in controls.data.places():
            for bottleneck in ("linear", *controls.bottlenecks):
                for remedy in ("none",) if bottleneck == "linear" else controls.remedies:
                    yield FramePoint(place, remedy, bottleneck, seed)


class Runner:
    """Trains and measures the models of an experiment.

    Args:
        controls: of the experiment.
        folder: of the cache of frames; None means :func:`lamkernels.lam.data.cache_folder`.
    """

    def __init__(self, controls: FrameControls, folder: Path | None = None) -> None:
        self.controls = controls
        self._scenes = controls.data.scenes(controls.latent_dim, folder)
        self._last: tuple[Any, Scene] | None = None

    def run(self, point: FramePoint) -> Row:
        """The numbers of one model, on held-out transitions; those of :func:`measure`."""
        scene = self.scene(point)
        row: Row = dict(point.place)
        row |= {"remedy": point.remedy, "bottleneck": point.bottleneck, "seed": point.seed, **scene.numbers}
        if point.bottleneck == "linear":
            return row | _linear(scene, self.controls.latent_dim)
        controls, data = self.controls, self.controls.data
        k = controls.entries(point.bottleneck)
        config = FrameLAMConfig(
            data.size, data.channels, k, point.bottleneck, codebook_size=controls.codebook_size, width=controls.width
        )
        training = replace(controls.training, seed=point.seed)
        rows = scene.data.pairs[: scene.split]
        model = train_with_remedy(
            point.remedy, scene.data, rows, scene.region, config, training, device=controls.device
        )
        found = measure(model, scene)
        if point.remedy in WITHOUT_DECODER:
            found = {name: value for name, value in found.items() if name not in OF_THE_DECODER}
        return row | found

    def scene(self, point: FramePoint) -> Scene:
        """The frames of a point; those of the last one are kept."""
        key = point.seed, point.place
        if self._last is None or self._last[0] != key:
            self._last = key, self._scenes(*key)
        return self._last[1]


def _linear(scene: Scene, k: int) -> Row:
    """The closed form on the pixels of the same transitions."""
    data, pairs = scene.data, scene.data.pairs
    pixels = data.frames.flatten(1).float() / 255
    model = LinearLAM(k, rtol=SMALLEST)
    model.fit(pixels[pairs[: scene.split]], pixels[pairs[: scene.split] + 1])
    assert data.views is not None
    other = data.views.flatten(1).float() / 255
    latents = Latents(*(model.encode(frames[pairs], frames[pairs + 1]) for frames in (pixels, other)))

    def decode(frame: Tensor, z: Tensor) -> Tensor:
        return model.decode(frame.flatten(1), z).view_as(frame)

    return _measured(decode, latents, scene)


@torch.no_grad()
def measure(model: FrameLAM, scene: Scene) -> Row:
    """Everything that is asked of a trained model, on the held-out transitions of a scene.

    Args:
        model: in evaluation mode, on any device.
        scene: frames with views.
    """
    data, device = scene.data, model.mean.device
    assert data.views is not None

    def latents(frames: Tensor) -> tuple[Tensor, Tensor | None]:
        found = [
            model.infer(*(model.pixels(frames[at].to(device)) for at in (t, t + 1)))
            for t in torch.split(data.pairs, CHUNK)
        ]
        codes = [part.indices.cpu() for part in found if part.indices is not None]
        return torch.cat([part.z.cpu() for part in found]), torch.cat(codes) if codes else None

    def decode(frame: Tensor, z: Tensor) -> Tensor:
        parts = []
        for frames, latent in zip(torch.split(frame, CHUNK), torch.split(z, CHUNK), strict=True):
            own = (frames.to(device) - model.mean) / model.scale
            parts.append((model.decode(own, latent.to(device)) * model.scale + model.mean).cpu())
        return torch.cat(parts)

    (z, codes), (other, _) = latents(data.frames), latents(data.views)
    return _measured(decode, Latents(z, other, codes), scene)


def _measured(decode: Callable[[Tensor, Tensor], Tensor], latents: Latents, scene: Scene) -> Row:
    data, split, region = scene.data, scene.split, scene.region
    row: Row = dict(scene.probes(latents))
    pairs, z = data.pairs[split:], latents.z[split:]
    assert data.views is not None
    frame, next_frame, view, next_view = (
        frames[t].float() / 255 for frames in (data.frames, data.views) for t in (pairs, pairs + 1)
    )
    prediction = decode(frame, z)
    row |= {
        "prediction_error": float((prediction - next_frame).square().sum() / (frame - next_frame).square().sum()),
        "psnr": psnr(prediction, next_frame),
        "delta_psnr": controllability(decode, frame, next_frame, z),
        "delta_psnr_agent": controllability(decode, frame, next_frame, z, region),
        "transfer_agent": controllability(decode, view, next_view, z, region),
        "few_label_accuracy": few_label_accuracy(latents.z, scene.labels, split),
    }
    if latents.indices is not None:
        row["code_action_bits"] = mutual_information(latents.indices[split:], scene.labels[split:])
    return row


def rows_of(
    controls: FrameControls, journal: Path | None = None,
    *, folder: Path | None = None, processes: int = 1, progress: bool = False,
) -> list[Row]:  # fmt: skip
    """All rows of an experiment: :func:`lamkernels.lam.journal.kept_rows`."""
    run = Runner(controls, folder).run
    return kept_rows(controls, list(points(controls)), run, journal, processes=processes, progress=progress)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiments that are named, all without a name; returns the exit status."""
    parser = commands.parser(
        "lamkernels.lam.frame_experiments",
        "Latent action models on frames of games and tasks in front of what is known: frames-NAME.csv, .png, .json.",
        "nonlinear-lam",
        tuple(CONTROLS),
    )
    parser.add_argument("--large", action="store_true", help="more and larger frames, wider models: for a GPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]; default: %(default)s")
    commands.add_processes(parser)
    options = parser.parse_args(argv)

    def work() -> None:
        run(
            options.names, options.out, quick=options.quick, large=options.large, device=options.device,
            processes=options.processes,
        )  # fmt: skip

    return commands.status(parser, work)


def run(
    names: Sequence[str], out: Path,
    *, quick: bool = False, large: bool = False, device: str = "cpu", processes: int | None = None,
) -> None:  # fmt: skip
    """Writes ``frames-NAME.csv``, ``.png`` and, with its controls, ``.json`` for each experiment.

    Args:
        names: of :data:`CONTROLS`.
        out: folder; while an experiment runs, its rows are in ``frames-NAME.jsonl`` there.
        quick: fewer points, seeds, frames and steps.
        large: :meth:`FrameControls.large`; with ``quick``, that in small.
        device: that trains: "cpu" or "cuda[:N]".
        processes: :func:`lamkernels.lam.commands.processes_of`.

    Raises:
        ModuleNotFoundError: ale-py, dm_control, matplotlib, safetensors or tqdm is not installed.
        OSError: a file cannot be written.
        RenderingError: MuJoCo cannot render here.
        ValueError: a run with other controls was stopped in ``out``, or there is no such device.
    """
    commands.device_named(device)
    processes = commands.processes_of(processes, device)
    chosen = {name: replace(CONTROLS[name], device=device) for name in names}
    games = [isinstance(controls.data, GameData) for controls in chosen.values()]
    commands.need("matplotlib", "safetensors", "tqdm", *(["ale_py"] if any(games) else []))
    if not all(games):
        commands.need("dm_control", extra="control")
        check_rendering()
    if large:
        chosen = {name: controls.large() for name, controls in chosen.items()}
    write_experiments(names, out, chosen, rows_of, DRAW, quick=quick, processes=processes, prefix="frames-")


if __name__ == "__main__":
    sys.exit(main())
