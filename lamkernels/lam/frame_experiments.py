"""``python -m lamkernels.lam.frame_experiments [names] --out DIR``: the linear analysis against networks, on frames.

Atari frames in front of a background whose state is known, a small convolutional latent action model, and beside it the
closed form of the linear one on the same pixels. Each row is written when it is made, and a run that was stopped goes
on behind the last one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamkernels.lam import commands, frame_figures
from lamkernels.lam.data import DataConfig, FrameData, load_frames
from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.lam.frame_lam import FrameLAM, FrameLAMConfig
from lamkernels.lam.frame_metrics import (
    Latents,
    agent_innovation,
    controllability,
    few_label_accuracy,
    leakage_and_recovery,
    mutual_information,
    psnr,
)
from lamkernels.lam.frame_remedies import REMEDIES, WITHOUT_DECODER, train_with_remedy
from lamkernels.lam.frame_training import TrainingConfig
from lamkernels.lam.journal import Row, kept_rows, write_experiments
from lamkernels.lam.linear import LinearLAM
from lamkernels.lam.overlay import DIRECTION, OverlayConfig, agent_region, background, overlay, waves

OF_THE_DECODER = ("prediction_error", "psnr", "delta_psnr", "delta_psnr_agent", "transfer_agent")
SMALLEST = 1e-5  # variance of o that a linear regression of pixels uses, as a share of the largest


@dataclass(frozen=True)
class FrameControls:
    """Everything that a figure depends on.

    Attributes:
        game: of :data:`lamkernels.lam.data.GAMES`.
        transitions: played for each seed; three quarters are trained on, one is measured on.
        frame_skip: emulated frames of a transition.
        mean_hold: transitions for which the policy keeps an action: at 1 it draws a new one for each.
        size: S of the frames.
        spectrum: of ε, shares of σ².
        ratio: σ_ε² Σ_x φ₁(x)², the largest eigenvalue of F Σ_ε Fᵀ, over the k-th eigenvalue of the innovation of the
            same frames without a background.
        coupling: correlation of the first entry of ε with the action.
        remedies: of :data:`lamkernels.lam.frame_remedies.REMEDIES`.
        bottlenecks: of the trained models.
        latent_dim: k, of continuous latents and of the linear model.
        code_dim: entries of a code.
        codebook_size: K.
        width: of the convolutions.
        training: steps, batch size, learning rate.
        seeds: of the game, the background and the training, each a model of its own.
    """

    game: str = "breakout"
    transitions: int = 6000
    frame_skip: int = 6
    mean_hold: float = 1.0
    size: int = 16
    spectrum: tuple[float, ...] = (1.0, 0.7, 0.5)
    ratio: tuple[float, ...] = (4.0,)
    coupling: tuple[float, ...] = (0.0,)
    remedies: tuple[str, ...] = ("none",)
    bottlenecks: tuple[str, ...] = ("none", "vq")
    latent_dim: int = 1
    code_dim: int = 8
    codebook_size: int = 8
    width: int = 8
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seeds: tuple[int, ...] = (0, 1, 2)

    def quick(self) -> FrameControls:
        """Fewer points, seeds, frames and steps: seconds instead of minutes."""
        training = replace(self.training, steps=10, batch_size=32)
        return replace(
            self, transitions=300, ratio=self.ratio[::4], coupling=self.coupling[::3], training=training,
            seeds=self.seeds[:2],
        )  # fmt: skip


RATIOS = (0.125, 0.25, 0.5, 0.7, 1.4, 2.5, 6.0, 16.0)
CONTROLS = {
    "noise": FrameControls(ratio=RATIOS),
    "dependence": FrameControls(ratio=(0.25, 4.0), coupling=(0.0, 0.4, 0.8, 1.0), bottlenecks=("none",)),
    "remedies": FrameControls(remedies=REMEDIES),
}
DRAW: dict[str, Callable[[list[Row]], bytes]] = {
    "noise": frame_figures.noise,
    "dependence": frame_figures.dependence,
    "remedies": frame_figures.remedies,
}


@dataclass(frozen=True)
class FramePoint:
    """One model: a place of the sweep, a remedy, a bottleneck ("linear" for the closed form), a seed."""

    ratio: float
    coupling: float
    remedy: str
    bottleneck: str
    seed: int


def points(controls: FrameControls) -> Iterator[FramePoint]:
    """All models of an experiment, data in the outer loops: frames are drawn once. The linear one has no remedies."""
    for seed in controls.seeds:
        for ratio in controls.ratio:
            for coupling in controls.coupling:
                for bottleneck in ("linear", *controls.bottlenecks):
                    for remedy in ("none",) if bottleneck == "linear" else controls.remedies:
                        yield FramePoint(ratio, coupling, remedy, bottleneck, seed)


@dataclass(frozen=True)
class Scene:
    """The frames of a point, and what they are measured with.

    Attributes:
        data: in front of the background, with views in front of another.
        region: (S, S) bool, the agent's.
        split: pairs before it are trained on.
        strength: σ, grey levels.
        agent_ratio: the largest eigenvalue of F Σ_ε Fᵀ over :func:`lamkernels.lam.frame_metrics.agent_innovation`.
    """

    data: ExogenousFrames
    region: Tensor
    split: int
    strength: float
    agent_ratio: float


class Runner:
    """Trains and measures the models of an experiment.

    Args:
        controls: of the experiment.
        folder: of the cache of frames; None means :func:`lamkernels.lam.data.cache_folder`.
    """

    def __init__(self, controls: FrameControls, folder: Path | None = None) -> None:
        self.controls, self.folder = controls, folder
        self.direction = torch.tensor(DIRECTION[controls.game])
        self._games: dict[int, tuple[FrameData, float, float, float]] = {}
        self._last: tuple[Any, Scene] | None = None

    def run(self, point: FramePoint) -> Row:
        """The numbers of one model, on held-out transitions; those of :func:`measure`."""
        scene = self.scene(point)
        row: Row = {**asdict(point), "strength": scene.strength, "agent_ratio": scene.agent_ratio}
        if point.bottleneck == "linear":
            return row | self._linear(scene)
        controls = self.controls
        k = controls.latent_dim if point.bottleneck in ("none", "gaussian") else controls.code_dim
        config = FrameLAMConfig(
            controls.size, 1, k, point.bottleneck, codebook_size=controls.codebook_size, width=controls.width
        )
        training = replace(controls.training, seed=point.seed)
        rows = scene.data.pairs[: scene.split]
        model = train_with_remedy(point.remedy, scene.data, rows, scene.region, config, training)
        found = measure(model, scene, self.direction)
        if point.remedy in WITHOUT_DECODER:
            found = {name: value for name, value in found.items() if name not in OF_THE_DECODER}
        return row | found

    def scene(self, point: FramePoint) -> Scene:
        """The frames of a point; those of the last one are kept."""
        key = point.seed, point.ratio, point.coupling
        if self._last is None or self._last[0] != key:
            game, eigenvalue, agent, wave = self._game(point.seed)
            strength = (point.ratio * eigenvalue / wave) ** 0.5
            config = OverlayConfig(
                strength, self.controls.spectrum, coupling=point.coupling, views=True, seed=point.seed
            )
            data = overlay(game, config)
            region = agent_region(self.controls.game, self.controls.size)
            split = len(data.pairs) * 3 // 4
            self._last = key, Scene(data, region, split, strength, point.ratio * eigenvalue / agent)
        return self._last[1]

    def _game(self, seed: int) -> tuple[FrameData, float, float, float]:
        """Frames, λ_k of their innovation and the agent's part, grey levels squared, and Σ_x φ₁² where it shows."""
        if seed not in self._games:
            c = self.controls
            game = load_frames(DataConfig(c.game, c.transitions, seed, c.frame_skip, c.size, c.mean_hold),
                               folder=self.folder)  # fmt: skip
            grey, behind = background(game)
            pairs = game.pairs
            o, o_next = (grey[t].flatten(1) for t in (pairs, pairs + 1))
            eigenvalue = float(LinearLAM(c.latent_dim, rtol=SMALLEST).fit(o, o_next).eigenvalues[c.latent_dim - 1])
            agent = agent_innovation(torch.stack([grey[pairs], grey[pairs + 1]], 1), agent_region(c.game, c.size))
            wave = float((waves(c.size, 1)[0].square() * behind.double().mean(0)).sum())
            self._games[seed] = game, eigenvalue, agent, wave
        return self._games[seed]

    def _linear(self, scene: Scene) -> Row:
        """The closed form on the pixels of the same transitions."""
        data, pairs = scene.data, scene.data.pairs
        pixels = data.frames.flatten(1).float() / 255
        model = LinearLAM(self.controls.latent_dim, rtol=SMALLEST)
        model.fit(pixels[pairs[: scene.split]], pixels[pairs[: scene.split] + 1])
        assert data.views is not None
        other = data.views.flatten(1).float() / 255
        latents = Latents(*(model.encode(frames[pairs], frames[pairs + 1]) for frames in (pixels, other)))

        def decode(frame: Tensor, z: Tensor) -> Tensor:
            return model.decode(frame.flatten(1), z).view_as(frame)

        return _measured(decode, latents, scene, self.direction)


@torch.no_grad()
def measure(model: FrameLAM, scene: Scene, direction: Tensor) -> Row:
    """Everything that is asked of a trained model, on the held-out transitions of a scene.

    Args:
        model: in evaluation mode.
        scene: frames with views.
        direction: (p,), of the action.
    """
    data, pairs = scene.data, scene.data.pairs
    assert data.views is not None
    own, other = (
        model.infer(model.pixels(frames[pairs]), model.pixels(frames[pairs + 1]))
        for frames in (data.frames, data.views)
    )

    def decode(frame: Tensor, z: Tensor) -> Tensor:
        return model.decode((frame - model.mean) / model.scale, z) * model.scale + model.mean

    return _measured(decode, Latents(own.z, other.z, own.indices), scene, direction)


def _measured(decode: Callable[[Tensor, Tensor], Tensor], latents: Latents, scene: Scene, direction: Tensor) -> Row:
    data, split, region = scene.data, scene.split, scene.region
    row: Row = dict(leakage_and_recovery(data, latents, direction, region, split))
    pairs, z = data.pairs[split:], latents.z[split:]
    assert data.views is not None
    frame, next_frame, view, next_view = (
        frames[t].float() / 255 for frames in (data.frames, data.views) for t in (pairs, pairs + 1)
    )
    prediction = decode(frame, z)
    labels = data.actions[data.pairs].argmax(1)
    row |= {
        "prediction_error": float((prediction - next_frame).square().sum() / (frame - next_frame).square().sum()),
        "psnr": psnr(prediction, next_frame),
        "delta_psnr": controllability(decode, frame, next_frame, z),
        "delta_psnr_agent": controllability(decode, frame, next_frame, z, region),
        "transfer_agent": controllability(decode, view, next_view, z, region),
        "few_label_accuracy": few_label_accuracy(latents.z, labels, split),
    }
    if latents.indices is not None:
        row["code_action_bits"] = mutual_information(latents.indices[split:], labels[split:])
    return row


def rows_of(
    controls: FrameControls, journal: Path | None = None, *, folder: Path | None = None, progress: bool = False
) -> list[Row]:
    """All rows of an experiment: :func:`lamkernels.lam.journal.kept_rows`."""
    return kept_rows(controls, list(points(controls)), Runner(controls, folder).run, journal, progress=progress)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiments that are named, all without a name; returns the exit status."""
    parser = commands.parser(
        "lamkernels.lam.frame_experiments",
        "Latent action models on Atari frames in front of a known background: frames-NAME.csv and .png.",
        "nonlinear-lam",
        tuple(CONTROLS),
    )
    options = parser.parse_args(argv)
    return commands.status(parser, lambda: run(options.names, options.out, quick=options.quick))


def run(names: Sequence[str], out: Path, *, quick: bool = False) -> None:
    """Writes ``frames-NAME.csv`` and ``frames-NAME.png`` for each experiment.

    Args:
        names: of :data:`CONTROLS`.
        out: folder; while an experiment runs, its rows are in ``frames-NAME.jsonl`` there.
        quick: fewer points, seeds, frames and steps.

    Raises:
        ModuleNotFoundError: ale-py, matplotlib, safetensors or tqdm is not installed.
        OSError: a file cannot be written.
        ValueError: a run with other controls was stopped in ``out``.
    """
    commands.need("ale_py", "matplotlib", "safetensors", "tqdm")
    write_experiments(names, out, CONTROLS, rows_of, DRAW, quick=quick, prefix="frames-")


if __name__ == "__main__":
    sys.exit(main())
