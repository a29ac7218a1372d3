"""dm_control tasks with the distractors of the Distracting Control Suite, and their state: frames for experiments."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamkernels.lam import distractors
from lamkernels.lam.commands import RenderingError
from lamkernels.lam.distractors import KINDS, SCALES, VIDEOS, CameraState
from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.validation import check_integer, check_option

# how much of the ground hides the background, as published: all of it under those that run
GROUND = {"reacher": 0.0, "walker": 1.0, "cheetah": 1.0}
OTHER_GROUND = 0.3
VIEWS = {"camera": ("camera",), "scene": ("scene",), "both": ("scene", "camera")}


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
        views: whether there are views too.
        view_kind: "camera": views are from another camera, which has a background and a movement of its own; "scene":
            from the first again, in a scene where all distractors are others; "both": the latter, and ``second_views``
            are the former.
        side: of the other camera: how far it has turned around the agent from where the first one is, radians; None
            takes the task's second camera.
        shadows: False draws neither shadows nor reflections, which take ten times as long as the rest without a GPU.
        smooth: False draws edges without multisampling, which takes most of the time without a GPU; pixels that are
            means of several rendered ones do not need it.
        stops: whether all velocities are set to zero before each transition, so that a frame shows the whole state.
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
    view_kind: str = "camera"
    side: float | None = None
    shadows: bool = True
    smooth: bool = True
    stops: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError where a field has no meaning."""
        for name in ("transitions", "episode", "size", "action_repeat"):
            check_integer(name, getattr(self, name))
        check_option("difficulty", self.difficulty, tuple(SCALES))
        check_option("view_kind", self.view_kind, tuple(VIEWS))
        for kind in self.distractors:
            check_option("distractors", kind, KINDS)
        if self.mean_hold < 1:
            raise ValueError(f"mean_hold is {self.mean_hold}; it must be at least 1")


class _Eye(NamedTuple):
    """What one camera sees during an episode of T frames."""

    camera: Any  # dm_control's: a new one for every picture would be most of the time
    number: int
    backgrounds: Tensor | None  # (T, 3, S, S) uint8
    orbits: Tensor | None  # (T, 8)
    turn: float = 0.0  # around the agent, radians


def collect(config: ControlConfig) -> ExogenousFrames:
    """Plays the task with a random policy and renders it with the distractors.

    ξ is, of the distractors that are there and in this order: the brightness of the background in 4 × 4 cells; the
    change of each material's red, green and blue; the camera's horizontal angle, vertical angle, zoom and roll, and
    their velocities. ε_t = ξ_{t+1} − ξ_t. The background is drawn behind the rendered picture and does not turn with
    the camera.

    Raises:
        ModuleNotFoundError: dm_control is not installed.
        RenderingError: MuJoCo cannot render here.
        ValueError: there is no such task, or it has one camera, and views from its second one are asked for.
    """
    suite = _suite()
    if (config.domain, config.task) not in suite.ALL_TASKS:
        raise ValueError(f"{config.domain}-{config.task} is no task of dm_control's suite")
    options = {"random": config.seed, "time_limit": float("inf")}  # at its limit it would start over within an episode
    environment = suite.load(config.domain, config.task, task_kwargs=options)
    physics, task, spec = environment.physics, environment.task, environment.action_spec()
    substeps = round(environment.control_timestep() / physics.timestep())
    kinds = ("own", *(VIEWS[config.view_kind] if config.views else ()))
    cameras = [int(kind == "camera" and config.side is None) for kind in kinds]
    turns = [(config.side or 0.0) * (kind == "camera") for kind in kinds]
    if physics.model.ncam <= max(cameras):
        raise ValueError(f"{config.domain}-{config.task} has one camera; views from another need a side")
    generator, policy = torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)
    videos = []
    if "background" in config.distractors:
        videos = distractors.background_videos(config.size, VIDEOS[config.difficulty], config.seed, config.videos)
    materials, agent = _Materials(physics), _Agent(physics)
    buffer = physics.model.vis.global_
    buffer.offwidth = buffer.offheight = config.size  # without a GPU, clearing the default one takes half of the time
    if not config.smooth:
        physics.model.vis.quality.offsamples = 0
    made = {number: _camera(physics, config.size, number) for number in set(cameras)}
    frames: list[list[Tensor]] = [[] for _ in cameras]
    states: list[list[Tensor]] = [[] for _ in cameras]
    actions, starts, masks, places = [], [], [], []
    left = config.transitions
    while left:
        length = min(left, config.episode)
        left -= length
        eyes = [
            _eye(config, made[camera], camera, turn, length + 1, videos, generator)
            for camera, turn in zip(cameras, turns, strict=True)
        ]
        colours: list[Tensor | None] = [None for _ in cameras]
        if "colour" in config.distractors:
            walks = [
                _colours(config, len(materials.used), length + 1, generator) for _ in range(1 + ("scene" in kinds))
            ]
            colours = [walks[kind == "scene"] for kind in kinds]
        for number, eye in enumerate(eyes):
            states[number].append(_state(eye, colours[number], length + 1))
        environment.reset()
        action = policy.uniform(spec.minimum, spec.maximum)
        for step in range(length + 1):
            for number, (eye, own) in enumerate(zip(eyes, colours, strict=True)):
                if own is not None:
                    materials.change(own[step].numpy())
                picture, objects = _picture(config, physics, eye, step)
                frames[number].append(picture)
                if number == 0:
                    masks.append(agent.mask(objects))
            places.append(agent.places())
            if policy.random() < 1 / config.mean_hold:
                action = policy.uniform(spec.minimum, spec.maximum)
            last = step == length
            actions.append(torch.zeros(spec.shape[0]) if last else torch.from_numpy(action).float())
            starts.append(step == 0)
            if config.stops:
                physics.data.qvel[:] = 0
                physics.forward()
            for _ in range(0 if last else config.action_repeat):  # without the observations of a step
                task.before_step(action, physics)
                physics.step(substeps)
                task.after_step(physics)
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
        masks=torch.stack(masks),
        places=torch.stack(places),
        second_views=torch.stack(frames[2]) if len(kinds) > 2 else None,
    )


def check_rendering() -> None:
    """Renders one small picture, so that an experiment fails before its work and not after it.

    Raises:
        ModuleNotFoundError: dm_control is not installed.
        RenderingError: MuJoCo cannot render here.
    """
    physics = _suite().load("cartpole", "swingup").physics
    _picture(ControlConfig(shadows=False), physics, _Eye(_camera(physics, 8, 0), 0, None, None), 0)


def _suite() -> Any:
    os.environ.setdefault("MUJOCO_GL", "egl")
    with contextlib.suppress(ModuleNotFoundError):  # first: behind Mesa, which renders without a GPU, its LLVM crashes
        importlib.import_module("triton")
    try:
        from dm_control import suite
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a missing libEGL shows as whatever PyOpenGL makes of it
        raise _cannot_render(error) from error
    return suite


def _cannot_render(error: Exception) -> RenderingError:
    said = " ".join(str(error).split())
    return RenderingError(
        f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {type(error).__name__}: {said}; egl "
        "needs libEGL (Debian: apt-get install libegl1)"
    )


def _camera(physics: Any, size: int, number: int) -> Any:
    from dm_control.mujoco import Camera

    try:
        return Camera(physics, size, size, number)
    except Exception as error:  # what a renderer raises is up to the driver
        raise _cannot_render(error) from error


def _eye(
    config: ControlConfig,
    camera: Any,
    number: int,
    turn: float,
    frames: int,
    videos: list[Tensor],
    generator: torch.Generator,
) -> _Eye:
    backgrounds = orbits = None
    if "background" in config.distractors:
        backgrounds = distractors.background_walk(videos, frames, generator, dynamic=config.dynamic)
    if "camera" in config.distractors:
        scale, above = SCALES[config.difficulty], config.domain != "reacher"
        orbits = distractors.camera_walk(frames, scale, generator, dynamic=config.dynamic, above=above)
    return _Eye(camera, number, backgrounds, orbits, turn)


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


class _Agent:
    """The bodies that can move."""

    def __init__(self, physics: Any) -> None:
        self.data = physics.data
        self.moves = physics.model.body_weldid[physics.model.geom_bodyid] != 0  # by geom

    def mask(self, objects: np.ndarray) -> Tensor:
        """(S, S) uint8 of what was rendered: 255 where the agent is."""
        return torch.from_numpy(255 * _seen(objects, self.moves).astype(np.uint8))

    def places(self) -> Tensor:
        """(m,) float32: the centres of all its parts, metres."""
        return torch.from_numpy(self.data.geom_xpos[self.moves].astype(np.float32).ravel())


def _seen(objects: np.ndarray, geoms: np.ndarray) -> np.ndarray:
    """(S, S) bool: the pixels of what was rendered that show one of the geoms (G,) bool."""
    import mujoco

    numbers, kinds = objects[..., 0], objects[..., 1]
    solid = kinds == int(mujoco.mjtObj.mjOBJ_GEOM)
    seen: np.ndarray = solid & geoms[np.where(solid, numbers, 0)]
    return seen


def _colours(config: ControlConfig, materials: int, frames: int, generator: torch.Generator) -> Tensor:
    scale = SCALES[config.difficulty]
    return distractors.colour_walk(materials, frames, scale, generator, dynamic=config.dynamic)


def _picture(config: ControlConfig, physics: Any, eye: _Eye, step: int) -> tuple[Tensor, np.ndarray]:
    """What the eye sees, (3, S, S) uint8, and the number and kind of the object at each pixel, (S, S, 2)."""
    left_out = {} if config.shadows else {"shadow": False, "reflection": False}
    with _moved(physics, eye, step):
        try:
            pixels = eye.camera.render(render_flag_overrides=left_out).copy()
            objects = eye.camera.render(segmentation=True)
        except Exception as error:  # what a renderer raises is up to the driver
            raise _cannot_render(error) from error
    picture = torch.from_numpy(pixels).permute(2, 0, 1)
    if eye.backgrounds is None:
        return picture, objects
    ground = GROUND.get(config.domain, OTHER_GROUND)
    opacity = torch.from_numpy(_opacity(physics, objects, ground))
    return distractors.composed(picture, eye.backgrounds[step], opacity), objects


def _opacity(physics: Any, objects: np.ndarray, ground: float) -> np.ndarray:
    """(S, S) float32 of what was rendered: 0 in the sky, ``ground`` on a plane, 1 elsewhere."""
    import mujoco

    on_plane = _seen(objects, physics.model.geom_type == int(mujoco.mjtGeom.mjGEOM_PLANE))
    return np.where(objects[..., 0] < 0, 0.0, np.where(on_plane, ground, 1.0)).astype(np.float32)


@contextlib.contextmanager
def _moved(physics: Any, eye: _Eye, step: int) -> Iterator[None]:
    """Inside, the camera is where its distractor wants it; the next step of the physics puts it back anyway."""
    if eye.orbits is None and not eye.turn:
        yield
        return
    state = CameraState(*([0.0] * 4 if eye.orbits is None else eye.orbits[step, :4].tolist()))
    data, camera = physics.data, eye.number
    position, rotation = data.cam_xpos[camera].copy(), data.cam_xmat[camera].copy()
    place, axes = torch.from_numpy(position), torch.from_numpy(rotation).view(3, 3)
    agent = torch.from_numpy(data.subtree_com[0].copy())  # of everything that has mass
    distance = max(float((place - agent) @ axes[:, 2]), 0.1)
    moved, turned = distractors.orbit(place, axes, distance, state._replace(horizontal=state.horizontal + eye.turn))
    data.cam_xpos[camera], data.cam_xmat[camera] = moved.numpy(), turned.reshape(9).numpy()
    try:
        yield
    finally:
        data.cam_xpos[camera], data.cam_xmat[camera] = position, rotation
