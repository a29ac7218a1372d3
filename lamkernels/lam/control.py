"""dm_control tasks with the distractors of the Distracting Control Suite, and their state: frames for experiments."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamkernels.lam import distractors
from lamkernels.lam.distractors import KINDS, SCALES, VIDEOS, CameraState
from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.validation import check_integer, check_option

# how much of the ground hides the background, as published: all of it under those that run
GROUND = {"reacher": 0.0, "walker": 1.0, "cheetah": 1.0}
OTHER_GROUND = 0.3


@dataclass(frozen=True)
class ControlConfig:
    """What to collect; two equal configurations give equal frames on one machine.

    Attributes:
        domain: of the task, such as "cartpole".
        task: such as "swingup".
        transitions: pairs of frames.
        episode: transitions of an episode.
        size: of the frames, pixels.
        seed: of the task, the policy and the distractors.
        action_repeat: steps of the task per transition.
        mean_hold: transitions for which the random policy keeps an action, on average.
        difficulty: "easy", "medium" or "hard": β is 0.1, 0.2 or 0.3, of 4, 8 or 60 videos.
        distractors: some of "background", "colour" and "camera".
        dynamic: whether they move within an episode; otherwise they change between episodes.
        videos: a folder of backgrounds; None makes moving ones.
        views: whether the task's second camera is rendered too, behind it another background.
    """

    domain: str = "cartpole"
    task: str = "swingup"
    transitions: int = 1000
    episode: int = 100
    size: int = 64
    seed: int = 0
    action_repeat: int = 4
    mean_hold: float = 2.0
    difficulty: str = "easy"
    distractors: tuple[str, ...] = KINDS
    dynamic: bool = True
    videos: Path | str | None = None
    views: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError where a field has no meaning."""
        for name in ("transitions", "episode", "size", "action_repeat"):
            check_integer(name, getattr(self, name))
        check_option("difficulty", self.difficulty, tuple(SCALES))
        for kind in self.distractors:
            check_option("distractors", kind, KINDS)
        if self.mean_hold < 1:
            raise ValueError(f"mean_hold is {self.mean_hold}; it must be at least 1")


class _Eye(NamedTuple):
    """What one camera sees during an episode of T frames."""

    camera: int
    backgrounds: Tensor | None  # (T, 3, S, S) uint8
    orbits: Tensor | None  # (T, 8)


def collect(config: ControlConfig) -> ExogenousFrames:
    """Plays the task with a random policy and renders it with the distractors.

    ξ is, of the distractors that are there and in this order: the brightness of the background in 4 × 4 cells; the
    change of each material's red, green and blue; the camera's horizontal angle, vertical angle, zoom and roll, and
    their velocities. ε_t = ξ_{t+1} − ξ_t. The background is drawn behind the rendered picture and does not turn with
    the camera.

    Raises:
        ModuleNotFoundError: dm_control is not installed.
        RuntimeError: MuJoCo cannot render here.
        ValueError: there is no such task, or it has one camera and ``views`` are asked for.
    """
    suite = _suite()
    if (config.domain, config.task) not in suite.ALL_TASKS:
        raise ValueError(f"{config.domain}-{config.task} is no task of dm_control's suite")
    options = {"random": config.seed, "time_limit": float("inf")}  # at its limit it would start over within an episode
    environment = suite.load(config.domain, config.task, task_kwargs=options)
    physics, spec = environment.physics, environment.action_spec()
    if config.views and physics.model.ncam < 2:
        raise ValueError(f"{config.domain}-{config.task} has one camera; views need two")
    generator, policy = torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)
    videos = []
    if "background" in config.distractors:
        videos = distractors.background_videos(config.size, VIDEOS[config.difficulty], config.seed, config.videos)
    cameras = (0, 1) if config.views else (0,)
    materials = _Materials(physics)
    frames: list[list[Tensor]] = [[] for _ in cameras]
    states: list[list[Tensor]] = [[] for _ in cameras]
    actions, starts = [], []
    left = config.transitions
    while left:
        length = min(left, config.episode)
        left -= length
        eyes = [_eye(config, camera, length + 1, videos, generator) for camera in cameras]
        colours = None
        if "colour" in config.distractors:
            colours = distractors.colour_walk(
                len(materials.used), length + 1, SCALES[config.difficulty], generator, dynamic=config.dynamic
            )
        for number, eye in enumerate(eyes):
            states[number].append(_state(eye, colours, length + 1))
        environment.reset()
        action = policy.uniform(spec.minimum, spec.maximum)
        for step in range(length + 1):
            if colours is not None:
                materials.change(colours[step].numpy())
            for number, eye in enumerate(eyes):
                frames[number].append(_picture(config, physics, eye, step))
            if policy.random() < 1 / config.mean_hold:
                action = policy.uniform(spec.minimum, spec.maximum)
            last = step == length
            actions.append(torch.zeros(spec.shape[0]) if last else torch.from_numpy(action).float())
            starts.append(step == 0)
            for _ in range(0 if last else config.action_repeat):
                environment.step(action)
    starts_ = torch.tensor(starts)
    first = torch.cat(states[0])
    return ExogenousFrames(
        frames=torch.stack(frames[0]),
        actions=torch.stack(actions),
        starts=starts_,
        exogenous=first.float(),
        innovation=distractors.innovations(first, starts_).float(),
        views=torch.stack(frames[1]) if config.views else None,
        view_exogenous=torch.cat(states[1]).float() if config.views else None,
    )


def _suite() -> Any:
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        from dm_control import suite
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a missing libEGL shows as whatever PyOpenGL makes of it
        raise RuntimeError(_cannot_render(error)) from error
    return suite


def _cannot_render(error: Exception) -> str:
    return (
        f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {type(error).__name__}: {error}; egl "
        "needs libEGL (Debian: apt-get install libegl1)"
    )


def _eye(config: ControlConfig, camera: int, frames: int, videos: list[Tensor], generator: torch.Generator) -> _Eye:
    backgrounds = orbits = None
    if "background" in config.distractors:
        backgrounds = distractors.background_walk(videos, frames, generator, dynamic=config.dynamic)
    if "camera" in config.distractors:
        scale, above = SCALES[config.difficulty], config.domain != "reacher"
        orbits = distractors.camera_walk(frames, scale, generator, dynamic=config.dynamic, above=above)
    return _Eye(camera, backgrounds, orbits)


def _state(eye: _Eye, colours: Tensor | None, frames: int) -> Tensor:
    parts = [torch.zeros((frames, 0), dtype=torch.float64)]
    if eye.backgrounds is not None:
        parts.append(distractors.background_state(eye.backgrounds))
    if colours is not None:
        parts.append(colours.flatten(1))
    if eye.orbits is not None:
        parts.append(eye.orbits)
    return torch.cat(parts, 1)


class _Materials:
    """The colours of what is not ground."""

    def __init__(self, physics: Any) -> None:
        import mujoco

        model = physics.model
        self.model = model
        bodies = (model.geom_matid >= 0) & (model.geom_type != int(mujoco.mjtGeom.mjGEOM_PLANE))
        self.used = np.unique(model.geom_matid[bodies])
        self.own = model.mat_rgba[self.used, :3].copy()

    def change(self, by: np.ndarray) -> None:
        """Adds (materials, 3) to the colours that the task has."""
        self.model.mat_rgba[self.used, :3] = np.clip(self.own + by, 0, 1)


def _picture(config: ControlConfig, physics: Any, eye: _Eye, step: int) -> Tensor:
    size = config.size
    with _moved(physics, eye, step):
        try:
            pixels = physics.render(size, size, camera_id=eye.camera)
            objects = physics.render(size, size, camera_id=eye.camera, segmentation=True)
        except Exception as error:  # what a renderer raises is up to the driver
            raise RuntimeError(_cannot_render(error)) from error
    picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    if eye.backgrounds is None:
        return picture
    ground = GROUND.get(config.domain, OTHER_GROUND)
    opacity = torch.from_numpy(_opacity(physics, objects, ground))
    return distractors.composed(picture, eye.backgrounds[step], opacity)


def _opacity(physics: Any, objects: np.ndarray, ground: float) -> np.ndarray:
    """(S, S) float32 of what was rendered: 0 in the sky, ``ground`` on a plane, 1 elsewhere."""
    import mujoco

    numbers, kinds = objects[..., 0], objects[..., 1]
    geoms = kinds == int(mujoco.mjtObj.mjOBJ_GEOM)
    planes = physics.model.geom_type == int(mujoco.mjtGeom.mjGEOM_PLANE)
    on_plane = geoms & planes[np.where(geoms, numbers, 0)]
    return np.where(numbers < 0, 0.0, np.where(on_plane, ground, 1.0)).astype(np.float32)


@contextmanager
def _moved(physics: Any, eye: _Eye, step: int) -> Iterator[None]:
    """Inside, the camera is where its distractor wants it; the next step of the physics puts it back anyway."""
    if eye.orbits is None:
        yield
        return
    data, camera = physics.data, eye.camera
    position, rotation = data.cam_xpos[camera].copy(), data.cam_xmat[camera].copy()
    place, axes = torch.from_numpy(position), torch.from_numpy(rotation).view(3, 3)
    agent = torch.from_numpy(data.subtree_com[0].copy())  # of everything that has mass
    distance = max(float((place - agent) @ axes[:, 2]), 0.1)
    moved, turned = distractors.orbit(place, axes, distance, CameraState(*eye.orbits[step, :4].tolist()))
    data.cam_xpos[camera], data.cam_xmat[camera] = moved.numpy(), turned.reshape(9).numpy()
    try:
        yield
    finally:
        data.cam_xpos[camera], data.cam_xmat[camera] = position, rotation
