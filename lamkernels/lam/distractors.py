"""The distractors of the Distracting Control Suite as maths on arrays: background, colour and camera, with their state.

Stone, Ramirez, Konolige and Jonschkowski, "The Distracting Control Suite: a challenging benchmark for reinforcement
learning from pixels" (arXiv 2101.02722), whose levels and ranges these are. What differs is said where it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lamkernels.lam.sources import Source, expanded

SCALES = {"easy": 0.1, "medium": 0.2, "hard": 0.3}  # β
VIDEOS = {"easy": 4, "medium": 8, "hard": 60}  # of the 60 training videos of DAVIS 2017
KINDS = ("background", "colour", "camera")
CLIP = 96  # frames of a synthetic video, and at most of a real one
GRATINGS, SLOWEST, FASTEST = 5, 0.02, 0.12  # of a synthetic video; cycles per frame
CELLS = 4  # the state of a background is its brightness in 4 × 4 cells


class CameraState(NamedTuple):
    """How far a camera is from its place: radians, and the share by which it is farther from what it looks at."""

    horizontal: float
    vertical: float
    zoom: float
    roll: float


def colour_walk(materials: int, steps: int, scale: float, generator: torch.Generator, *, dynamic: bool) -> Tensor:
    """The change of each material's colour, in units of [0, 1], (steps, materials, 3) float64.

    It starts uniformly in [−β, β]; where ``dynamic``, Gaussian steps of deviation 0.03 β follow, clipped to that range.

    Args:
        materials: how many.
        steps: T.
        scale: β.
        generator: of the draws.
        dynamic: False keeps the start.
    """
    state = scale * (2 * torch.rand((materials, 3), generator=generator, dtype=torch.float64) - 1)
    walk = [state]
    for _ in range(steps - 1):
        noise = torch.randn((materials, 3), generator=generator, dtype=torch.float64) if dynamic else 0.0
        state = (state + 0.03 * scale * noise).clamp(-scale, scale)
        walk.append(state)
    return torch.stack(walk)


def camera_walk(steps: int, scale: float, generator: torch.Generator, *, dynamic: bool, above: bool) -> Tensor:
    """The state of a camera and its velocity, (steps, 8) float64: :class:`CameraState`, then its change by step.

    Angles start uniformly in ±β π/2, the zoom in [−0.5 β, 1.5 β]. Where ``dynamic``, velocities take Gaussian steps of
    deviation β π/300, up to β π/50 in size, and turn around at the end of the range. These are the suite's numbers for
    the roll; it moves the rest of the camera in metres, where here all four entries move alike.

    Args:
        steps: T.
        scale: β.
        generator: of the draws.
        dynamic: False keeps the start.
        above: the camera does not go below its place, where the ground may hide the agent.
    """
    quarter = scale * math.pi / 2
    low = torch.tensor([-quarter, 0.0 if above else -quarter, -0.5 * scale, -quarter], dtype=torch.float64)
    high = torch.tensor([quarter, quarter, 1.5 * scale, quarter], dtype=torch.float64)
    roll = scale * math.pi / 300
    place = low + (high - low) * torch.rand(4, generator=generator, dtype=torch.float64)
    velocity = torch.zeros(4, dtype=torch.float64)
    walk = [torch.cat([place, velocity])]
    for _ in range(steps - 1):
        if dynamic:
            noise = roll * torch.randn(4, generator=generator, dtype=torch.float64)
            velocity = (velocity + noise).clamp(-6 * roll, 6 * roll)
        ahead = place + velocity
        outside = (ahead < low) | (ahead > high)
        velocity = torch.where(outside, -velocity, velocity)
        place = ahead.clamp(low, high)
        walk.append(torch.cat([place, velocity]))
    return torch.stack(walk)


def innovations(walk: Tensor, starts: Tensor) -> Tensor:
    """ε_t = ξ_{t+1} − ξ_t of a walk (T, n), zeros in the last row of an episode; starts (T,) bool."""
    change = torch.zeros_like(walk)
    change[:-1] = (walk[1:] - walk[:-1]).masked_fill(starts[1:, None], 0.0)
    return change


def orbit(position: Tensor, rotation: Tensor, distance: float, state: CameraState) -> tuple[Tensor, Tensor]:
    """A camera that turns around what it looks at.

    Args:
        position: (3,) float64, its place.
        rotation: (3, 3) float64: its axes as columns, right, up and backwards; it looks along minus the last one.
        distance: to what it looks at.
        state: what changes.

    Returns:
        The new position and rotation. The point at ``distance`` ahead stays in the middle of the picture.
    """
    target = position - distance * rotation[:, 2]
    turn = _about(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), state.horizontal)
    turned = turn @ rotation
    turned = _about(turned[:, 0], -state.vertical) @ turned
    turned = turned @ _about(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), state.roll)
    return target + distance * (1 + state.zoom) * turned[:, 2], turned


def _about(axis: Tensor, angle: float) -> Tensor:
    """The rotation (3, 3) about a unit axis, counter-clockwise (Rodrigues)."""
    x, y, z = axis.tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def synthetic_video(size: int, seed: int) -> Tensor:
    """A moving background, (96, 3, size, size) uint8: coloured gratings that drift, each at its own speed.

    Args:
        size: pixels.
        seed: of the gratings; two seeds are two videos.
    """
    generator = torch.Generator().manual_seed(seed)
    cycles = 4 * torch.rand((GRATINGS, 2), generator=generator) - 2  # in the picture
    speeds = SLOWEST + (FASTEST - SLOWEST) * torch.rand(GRATINGS, generator=generator)
    speeds *= torch.where(torch.rand(GRATINGS, generator=generator) < 0.5, -1.0, 1.0)
    colours = torch.randn((GRATINGS, 3), generator=generator)
    phases = torch.rand(GRATINGS, generator=generator)
    axis = torch.arange(size) / size
    waves = cycles[:, 0, None, None] * axis[:, None] + cycles[:, 1, None, None] * axis  # (G, S, S)
    angles = waves + phases[:, None, None] + speeds[:, None, None] * torch.arange(CLIP)[:, None, None, None]
    light = torch.einsum("tgij,gc->tcij", torch.cos(2 * math.pi * angles), colours) / math.sqrt(GRATINGS)
    return (255 * torch.sigmoid(1.5 * light)).round().to(torch.uint8)


def background_videos(size: int, count: int, seed: int, folder: Path | str | None = None) -> list[Tensor]:
    """``count`` videos (T, 3, size, size) uint8: synthetic ones, or the first ones of a folder.

    Args:
        size: pixels.
        count: at most.
        seed: of the synthetic ones.
        folder: of videos, of which the first 96 frames are taken; those that cannot be read are skipped.

    Raises:
        ValueError: no video of the folder could be read.
        FileNotFoundError: there is no such folder.
    """
    if folder is None:
        return [synthetic_video(size, (seed << 8) + number) for number in range(count)]
    videos: list[Tensor] = []
    reasons: list[str] = []
    for path in expanded(folder):
        if len(videos) == count:
            break
        source, frames = Source(path, side=size), 0
        parts: list[Tensor] = []
        for batch in source.frames():
            parts.append(batch.rows[: CLIP - frames])
            frames += len(parts[-1])
            if frames == CLIP:
                break
        if parts:
            videos.append(torch.cat(parts))
        reasons += [f"{skipped.source}: {skipped.reason}" for skipped in source.skipped]
    if not videos:
        raise ValueError(f"no background could be read; {'; '.join(reasons)}")
    return videos


def background_walk(videos: Sequence[Tensor], steps: int, generator: torch.Generator, *, dynamic: bool) -> Tensor:
    """The frames of one video, (steps, 3, S, S) uint8: forwards and backwards from a random frame, or that frame.

    Args:
        videos: one of which is drawn.
        steps: T.
        generator: of the draws.
        dynamic: False keeps the first frame.
    """
    video = videos[int(torch.randint(len(videos), (), generator=generator))]
    start = int(torch.randint(len(video), (), generator=generator))
    period = max(1, 2 * (len(video) - 1))  # there and back, without the ends twice
    place = (start + torch.arange(steps) * int(dynamic)) % period
    return video[torch.minimum(place, period - place) if len(video) > 1 else place]


def background_state(frames: Tensor) -> Tensor:
    """(T, 16) float64: the brightness in [0, 1] of the 4 × 4 cells of backgrounds (T, 3, S, S) uint8."""
    cells = torch.nn.functional.adaptive_avg_pool2d(frames.double().mean(1, keepdim=True) / 255, CELLS)
    return cells.flatten(1)


def composed(picture: Tensor, background: Tensor, opacity: Tensor) -> Tensor:
    """A picture (3, S, S) uint8 over a background (3, S, S) uint8, uint8.

    Args:
        picture: what was rendered.
        background: what shows behind it.
        opacity: (S, S) float in [0, 1], of the picture.
    """
    mixed = opacity * picture.float() + (1 - opacity) * background.float()
    return mixed.round().to(torch.uint8)
