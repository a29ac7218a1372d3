"""What the experiments on frames are made on: Atari in front of waves, and tasks of dm_control with distractors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lamkernels.lam.control import ControlConfig, collect
from lamkernels.lam.data import DataConfig, FrameData, load_frames, resize
from lamkernels.lam.distractors import CELLS
from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.lam.frame_metrics import Probes, agent_innovation
from lamkernels.lam.linear import LinearLAM
from lamkernels.lam.overlay import DIRECTION, OverlayConfig, agent_region, background, overlay, waves

Place = tuple[tuple[str, float | str], ...]  # of a sweep: names and values
SMALLEST = 1e-5  # variance of o that a linear regression of pixels uses, as a share of the largest
LARGE_TRANSITIONS, LARGE_GAME, LARGE_TASK = 50_000, 64, 32  # the sizes are pixels; a closed form has S² · C entries
CAMERA = 8  # entries of the state of a camera


@dataclass(frozen=True)
class Scene:
    """Frames, and what models of them are measured with.

    Attributes:
        data: with views: the same moments in front of something else.
        region: (S, S) bool, every pixel where the agent can be.
        place: (T, m) float: where the agent is, as far as a frame shows it.
        direction: (p, m) float: what of an action is asked for.
        labels: (P,) int64 of ``data.pairs``: the action, or the bin that it is in.
        numbers: of the scene, for every row of its models.
        kinds: entries of the exogenous state by kind, where there are several.
    """

    data: ExogenousFrames
    region: Tensor
    place: Tensor
    direction: Tensor
    labels: Tensor
    numbers: Mapping[str, float]
    kinds: Mapping[str, slice] = field(default_factory=dict)

    @property
    def split(self) -> int:
        """Pairs before it are trained on, the others are measured on."""
        return len(self.data.pairs) * 3 // 4

    @cached_property
    def probes(self) -> Probes:
        """Of leakage and recovery, for all models of the scene."""
        return Probes(self.data, self.direction, self.place, self.split, self.kinds)


Scenes = Callable[[int, Place], Scene]  # of a seed and a place


@dataclass(frozen=True)
class GameData:
    """Atari frames in front of :func:`lamkernels.lam.overlay.overlay`.

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
    """

    game: str = "breakout"
    transitions: int = 6000
    frame_skip: int = 6
    mean_hold: float = 1.0
    size: int = 16
    spectrum: tuple[float, ...] = (1.0, 0.7, 0.5)
    ratio: tuple[float, ...] = (4.0,)
    coupling: tuple[float, ...] = (0.0,)
    channels: ClassVar[int] = 1

    def places(self) -> list[Place]:
        """All of the sweep."""
        return [(("ratio", ratio), ("coupling", coupling)) for ratio in self.ratio for coupling in self.coupling]

    def quick(self) -> GameData:
        """Fewer places and frames."""
        return replace(self, transitions=300, ratio=self.ratio[::4], coupling=self.coupling[::3])

    def large(self) -> GameData:
        """More and larger frames."""
        return replace(self, transitions=LARGE_TRANSITIONS, size=LARGE_GAME)

    def scenes(self, latent_dim: int, folder: Path | None = None) -> Scenes:
        """Makes scenes; the games that were played are kept.

        Args:
            latent_dim: k of the eigenvalue that a ratio is of.
            folder: of the cache of frames; None means :func:`lamkernels.lam.data.cache_folder`.
        """
        return _GameScenes(self, latent_dim, folder)


class _GameScenes:
    def __init__(self, controls: GameData, latent_dim: int, folder: Path | None) -> None:
        self.controls, self.k, self.folder = controls, latent_dim, folder
        self._games: dict[int, tuple[FrameData, float, float, float]] = {}

    def __call__(self, seed: int, place: Place) -> Scene:
        c, at = self.controls, dict(place)
        ratio, coupling = (float(at[name]) for name in ("ratio", "coupling"))
        game, eigenvalue, agent, wave = self._game(seed)
        strength = (ratio * eigenvalue / wave) ** 0.5
        data = overlay(game, OverlayConfig(strength, c.spectrum, coupling=coupling, views=True, seed=seed))
        region = agent_region(c.game, c.size)
        return Scene(
            data, region,
            place=data.frames[:, :, region].flatten(1).float() / 255,
            direction=torch.tensor(DIRECTION[c.game])[:, None],
            labels=data.actions[data.pairs].argmax(1),
            numbers={"strength": strength, "agent_ratio": ratio * eigenvalue / agent},
        )  # fmt: skip

    def _game(self, seed: int) -> tuple[FrameData, float, float, float]:
        """Frames, λ_k of their innovation and the agent's part, grey levels squared, and Σ_x φ₁² where it shows."""
        if seed not in self._games:
            c = self.controls
            config = DataConfig(c.game, c.transitions, seed, c.frame_skip, c.size, c.mean_hold)
            game = load_frames(config, folder=self.folder)
            grey, behind = background(game)
            pairs = game.pairs
            eigenvalue = _eigenvalues(grey, pairs, self.k)[self.k - 1]
            agent = agent_innovation(torch.stack([grey[pairs], grey[pairs + 1]], 1), agent_region(c.game, c.size))
            wave = float((waves(c.size, 1)[0].square() * behind.double().mean(0)).sum())
            self._games[seed] = game, eigenvalue, agent, wave
        return self._games[seed]


@dataclass(frozen=True)
class TaskData:
    """A task of dm_control behind the three distractors: :func:`lamkernels.lam.control.collect`.

    A frame shows no velocity, so the action can be told from one transition only if nothing else moves the agent: all
    velocities are set to zero before each transition, and the policy draws a new action for each. The views are the
    first camera again, in a scene where all three distractors are others, the second views those of a camera at the
    side of the same scene, with a background and a movement of its own. Nothing casts a shadow.

    Attributes:
        domain: of the task.
        task: its name.
        transitions: of each seed; three quarters are trained on, one is measured on.
        episode: transitions of an episode.
        action_repeat: steps of the task of a transition.
        size: S of the frames, RGB.
        detail: pixels are the means of detail² that are rendered: an agent may be thinner than one.
        difficulty: of the distractors, of each scene.
        side: how far the other camera has turned around the agent, radians.
    """

    domain: str = "cartpole"
    task: str = "swingup"
    transitions: int = 5000
    episode: int = 20
    action_repeat: int = 30
    size: int = 16
    detail: int = 3
    difficulty: tuple[str, ...] = ("easy",)
    side: float = 0.8
    channels: ClassVar[int] = 3

    def places(self) -> list[Place]:
        """All of the sweep."""
        return [(("difficulty", difficulty),) for difficulty in self.difficulty]

    def quick(self) -> TaskData:
        """Fewer frames."""
        return replace(self, transitions=300)

    def large(self) -> TaskData:
        """More and larger frames."""
        return replace(self, transitions=LARGE_TRANSITIONS, size=LARGE_TASK)

    def scenes(self, latent_dim: int, folder: Path | None = None) -> Scenes:
        """Makes scenes.

        Args:
            latent_dim: k of the eigenvalue that a ratio is of.
            folder: unused, nothing is kept.
        """
        return partial(_task_scene, self, latent_dim)


def _task_scene(c: TaskData, k: int, seed: int, place: Place) -> Scene:
    difficulty = str(dict(place)["difficulty"])
    config = ControlConfig(
        c.domain, c.task, c.transitions, c.episode, c.detail * c.size, seed, c.action_repeat, mean_hold=1.0,
        difficulty=difficulty, views=True, view_kind="both", side=c.side, shadows=False, smooth=False, stops=True,
    )  # fmt: skip
    data, clean = (_shrunk(collect(made), c.size) for made in (config, replace(config, distractors=(), views=False)))
    assert data.masks is not None and data.places is not None
    played, pairs, width = data.actions[data.pairs], data.pairs, data.exogenous.shape[1]
    cells = CELLS**2
    noise, agent = _eigenvalues(data.frames, pairs, k)[0], _eigenvalues(clean.frames, pairs, k)[k - 1]
    return Scene(
        data,
        region=(data.masks > 0).any(0),
        place=data.places,
        direction=torch.eye(played.shape[1]),
        labels=((played > 0) * 2 ** torch.arange(played.shape[1])).sum(1),
        numbers={"ratio": noise / agent},
        kinds={
            "background": slice(cells), "colour": slice(cells, width - CAMERA), "camera": slice(width - CAMERA, width)
        },
    )  # fmt: skip


def _shrunk(data: ExogenousFrames, size: int) -> ExogenousFrames:
    """Frames and masks at (size, size), and the states in grey levels, as those of the overlay are."""
    assert data.masks is not None
    states: dict[str, Any] = {
        name: None if (state := getattr(data, name)) is None else 255 * state
        for name in ("exogenous", "innovation", "view_exogenous")
    }
    return replace(
        data,
        frames=resize(data.frames, size),
        views=None if data.views is None else resize(data.views, size),
        second_views=None if data.second_views is None else resize(data.second_views, size),
        masks=resize(data.masks[:, None], size)[:, 0],
        **states,
    )


def _eigenvalues(frames: Tensor, pairs: Tensor, k: int) -> list[float]:
    """The k largest eigenvalues of the innovation of frames (T, ...), in their units squared."""
    o, o_next = (frames[t].flatten(1).float() for t in (pairs, pairs + 1))
    return LinearLAM(k, rtol=SMALLEST).fit(o, o_next).eigenvalues[:k].tolist()
