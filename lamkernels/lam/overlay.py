"""Atari frames in front of a moving background whose state is known: o = E s + F ξ in pixels, by construction.

The agent stays what the emulator drew. Behind it a few smooth waves are added, whose amplitudes ξ follow
ξ_{t+1} = A ξ_t + ε_t, at a strength that is chosen, and with a correlation with the action that is chosen too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lamkernels.lam.data import POLICIES, DataConfig, FrameData
from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.validation import check_integer, check_number, check_option, check_weight

FLOOR = 64  # grey levels that the frame is raised by, so that the waves are not cut off at black
SPRITE = 16  # grey levels from the still background: what differs more is a sprite
FREQUENCIES = ((1, 0), (0, 1), (1, 1))  # cycles over the height and over the width, a cosine and a sine each
DIRECTION = dict.fromkeys(POLICIES, (0.0, 1.0, -1.0))  # of the actions: nothing, one way, the other
AGENT = {  # top, bottom, left, right of where the player can be, as shares of the frame
    "breakout": (189 / 210, 193 / 210, 0.0, 1.0),
    "pong": (34 / 210, 194 / 210, 140 / 160, 144 / 160),
    "freeway": (14 / 210, 196 / 210, 44 / 160, 52 / 160),
}


@dataclass(frozen=True)
class OverlayConfig:
    """The background; two equal configurations give equal bytes on the same frames.

    Attributes:
        strength: σ ≥ 0, standard deviation of the first entry of ε, grey levels; a wave of amplitude 1 has a root mean
            square of 1 grey level over the picture.
        spectrum: variances of the n entries of ε as shares of σ², from 1 to 6 of them.
        persistence: A in [0, 1), one number for all entries.
        coupling: c in [−1, 1], correlation of the first entry of ε with the action along :data:`DIRECTION`.
        views: whether every moment is also drawn in front of a second, independent background; that one is never
            coupled to the action.
        seed: of both backgrounds.
    """

    strength: float = 4.0
    spectrum: tuple[float, ...] = (1.0, 0.7, 0.5)
    persistence: float = 0.5
    coupling: float = 0.0
    views: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_weight("strength", self.strength)
        if not 1 <= len(self.spectrum) <= 2 * len(FREQUENCIES):
            raise ValueError(f"spectrum has {len(self.spectrum)} entries; it must have 1 to {2 * len(FREQUENCIES)}")
        for share in self.spectrum:
            check_weight("spectrum", share)
        check_number("persistence", self.persistence, lambda value: 0 <= value < 1, "in [0, 1)")
        check_number("coupling", self.coupling, lambda value: -1 <= value <= 1, "in [-1, 1]")


def overlay(data: FrameData, config: OverlayConfig) -> ExogenousFrames:
    """The frames in grey with the background of ``config``, rounded and cut off to uint8 once.

    The waves are added to every pixel but those of sprites, which differ from the median of all frames, and those of
    :func:`agent_region`, where only the player is.

    Args:
        data: frames (T, 3, S, S) of a game of :data:`lamkernels.lam.data.GAMES`.
        config: the background.

    Returns:
        Frames (T, 1, S, S), actions one-hot (T, p), zeros where there was none.

    Raises:
        TypeError: the frames are not of a game.
        ValueError: the coupling is not 0, and the actions never change.
    """
    grey, behind = background(data)
    acted = data.actions >= 0
    actions = F.one_hot(data.actions.clamp(min=0), len(data.action_names)).float() * acted[:, None]
    generator = torch.Generator().manual_seed(config.seed)
    played = actions @ torch.tensor(DIRECTION[_game(data)])
    state, innovation = _states(data.starts, acted, played, config, config.coupling, generator)
    frames = draw(grey, behind, state)
    view = view_state = None
    if config.views:
        view_state, _ = _states(data.starts, acted, played, config, 0.0, generator)
        view = draw(grey, behind, view_state)
    return ExogenousFrames(
        frames, actions, data.starts, state, innovation, view, view_state, action_names=data.action_names
    )


def background(data: FrameData) -> tuple[Tensor, Tensor]:
    """The frames in grey, (T, S, S) float in [0, 255], and where a background shows in them, (T, S, S) bool."""
    grey = data.frames.float().mean(1)
    still = (grey - grey.median(0).values).abs() <= SPRITE
    return grey, still & ~agent_region(_game(data), grey.shape[-1])


def draw(grey: Tensor, behind: Tensor, state: Tensor) -> Tensor:
    """Frames in front of a background.

    Args:
        grey: (T, S, S) float, in [0, 255].
        behind: (T, S, S) bool: the pixels where the background shows.
        state: (T, n) float: amplitudes of the waves, grey levels.

    Returns:
        (T, 1, S, S) uint8: grey + 64 + behind · Σ_j ξ_j φ_j, rounded and cut off to [0, 255].
    """
    field = torch.einsum("tn,nhw->thw", state, waves(grey.shape[-1], state.shape[1]).to(state))
    return (grey + FLOOR + behind * field).round().clamp(0, 255).to(torch.uint8)[:, None]


def waves(size: int, count: int) -> Tensor:
    """φ (n, S, S) fp64: cosines and sines of :data:`FREQUENCIES`, orthogonal, each of root mean square 1.

    Raises:
        TypeError: a number is not an int.
        ValueError: ``size`` is below 3, or ``count`` is not in [1, 6].
    """
    check_integer("size", size)
    check_integer("count", count)
    if size < 3 or count > 2 * len(FREQUENCIES):
        raise ValueError(f"size is {size} and count {count}; they must be at least 3 and at most 6")
    place = 2 * math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size
    found = []
    for vertical, horizontal in FREQUENCIES:
        phase = vertical * place[:, None] + horizontal * place
        found += [phase.cos(), phase.sin()]
    return math.sqrt(2) * torch.stack(found[:count])


def agent_region(game: str, size: int) -> Tensor:
    """(S, S) bool: every pixel that the player can touch."""
    check_option("game", game, tuple(AGENT))
    top, bottom, left, right = (share * size for share in AGENT[game])
    region = torch.zeros(size, size, dtype=torch.bool)
    region[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = True
    return region


def _game(data: FrameData) -> str:
    if not isinstance(data.config, DataConfig):
        raise TypeError(f"the frames have a {type(data.config).__name__}; the overlay needs those of a game")
    return data.config.game


def _states(
    starts: Tensor, acted: Tensor, played: Tensor, config: OverlayConfig, coupling: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """ξ and ε (T, n) float32: each episode starts from the stationary distribution."""
    scale = config.strength * torch.tensor(config.spectrum, dtype=torch.float64).sqrt()
    noise, fresh = torch.randn(2, len(starts), len(scale), generator=generator, dtype=torch.float64)
    if coupling:
        spread = played[acted].double().std(correction=0)
        if not float(spread):
            raise ValueError(f"coupling is {coupling}; the actions never change, so nothing correlates with them")
        action = (played.double() - played[acted].double().mean()) / spread
        noise[:, 0] = coupling * action + math.sqrt(1 - coupling**2) * noise[:, 0]
    innovation = noise * scale * acted[:, None]
    state = fresh * scale / math.sqrt(1 - config.persistence**2)
    for t in range(1, len(starts)):
        if not starts[t]:
            state[t] = config.persistence * state[t - 1] + innovation[t - 1]
    return state.float(), innovation.float()
