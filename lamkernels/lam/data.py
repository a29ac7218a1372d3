"""Frame pairs from Atari games: collected with ``ale-py``, cached on disk, served as index pairs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lamkernels.lam.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)

CACHE_VERSION = 1  # of the file format and of the behaviour policy
RESIZE_BATCH = 64

# What the behaviour policy plays, with its probabilities. The weights keep the player where its moves can be seen: an
# even walk in Freeway stays at the bottom kerb, where "down" does nothing.
POLICIES: dict[str, dict[str, float]] = {
    "pong": {"NOOP": 0.34, "RIGHT": 0.33, "LEFT": 0.33},
    "breakout": {"NOOP": 0.34, "RIGHT": 0.33, "LEFT": 0.33},
    "freeway": {"NOOP": 0.28, "UP": 0.40, "DOWN": 0.32},
}
GAMES = tuple(POLICIES)


@dataclass(frozen=True)
class DataConfig:
    """What to collect; two equal configurations give equal bytes under one version of ``ale-py``.

    Attributes:
        game: "pong", "breakout" or "freeway".
        transitions: frame pairs to collect.
        seed: of the emulator and of the behaviour policy.
        frame_skip: emulated frames per transition; the action is held for all of them. Six, not the usual four: the
            paddles of Pong and Breakout take about three frames to turn, and what cannot be seen cannot be recovered.
        size: height and width of the stored frames, pixels.
        mean_hold: transitions for which the policy keeps an action, on average (geometric).
    """

    game: str = "breakout"
    transitions: int = 12_500
    seed: int = 0
    frame_skip: int = 6
    size: int = 64
    mean_hold: float = 2.0

    def __post_init__(self) -> None:
        if self.game not in POLICIES:
            raise ValueError(f"game is {self.game!r}; it must be one of {', '.join(map(repr, GAMES))}")
        for name in ("transitions", "frame_skip", "size", "mean_hold"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class FrameData:
    """Frames in the order of play.

    Attributes:
        frames: (T, 3, S, S) uint8, RGB.
        actions: (T,) int64: the action, as an index into ``action_names``, that led from frame t to frame t + 1; −1 on
            the last frame of an episode. For evaluation only: the model never sees it.
        starts: (T,) bool: the first frame of an episode.
        action_names: names of the actions.
        config: what was asked for.
        lag: frames from o to o'.
    """

    frames: Tensor
    actions: Tensor
    starts: Tensor
    action_names: tuple[str, ...]
    config: DataclassInstance
    lag: int = 1

    @property
    def pairs(self) -> Tensor:
        """(P,) int64: every t whose frame t + lag belongs to the same episode."""
        episode = self.starts.cumsum(0)
        return (episode[self.lag :] == episode[: -self.lag]).nonzero().squeeze(1)

    def fingerprint(self) -> str:
        """SHA-256 of the frames, the actions and the episode starts."""
        digest = hashlib.sha256()
        for tensor in (self.frames, self.actions, self.starts):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def cache_folder() -> Path:
    """Where collected frames are kept: ``$LAMKERNELS_CACHE``, else ``lamkernels`` in the user's cache folder."""
    own = os.environ.get("LAMKERNELS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamkernels"


def load_frames(config: DataConfig, *, folder: Path | None = None, progress: bool = False) -> FrameData:
    """The frames of ``config``: from the cache when they are there and sound, else collected and cached.

    Args:
        config: what to collect.
        folder: of the cache; None means :func:`cache_folder`.
        progress: show a progress bar while collecting.

    Raises:
        ModuleNotFoundError: ``ale-py`` or ``safetensors`` is not installed.
    """
    metadata = _expected_metadata(config)
    name = (
        f"{config.game}-{config.transitions}x{config.size}px-skip{config.frame_skip}-hold{config.mean_hold:g}-"
        f"seed{config.seed}.safetensors"
    )
    path = (folder or cache_folder()) / name
    if path.exists():
        try:
            return _read(path, config, metadata)
        except ValueError as error:
            log.warning("collecting again: %s", error)
    data = collect(config, progress=progress)
    tensors = {"frames": data.frames, "actions": data.actions, "starts": data.starts}
    save_tensors(path, tensors, metadata | {"sha256": data.fingerprint()})
    return data


def collect(config: DataConfig, *, progress: bool = False) -> FrameData:
    """All frames of :func:`play`.

    Raises:
        ModuleNotFoundError: ``ale-py`` is not installed.
    """
    parts = list(play(config, progress=progress))
    frames, actions, starts = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("frames", "actions", "starts")
    )
    return FrameData(frames, actions, starts, tuple(POLICIES[config.game]), config)


def play(config: DataConfig, *, progress: bool = False) -> Iterator[FrameData]:
    """Plays ``config.transitions`` transitions with a random policy that holds each action for a while.

    The emulator runs without action repetition of its own (``repeat_action_probability`` 0), so that the recorded
    action is the one that was played. A lost life ends an episode; the serve that follows it in Breakout is no
    transition.

    Yields:
        Frames that follow those before, a few at a time.

    Raises:
        ModuleNotFoundError: ``ale-py`` is not installed.
    """
    from ale_py import Action, ALEInterface, LoggerMode, roms
    from tqdm import tqdm

    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale = ALEInterface()
    ale.setInt("random_seed", config.seed)
    ale.setFloat("repeat_action_probability", 0.0)
    rom = roms.get_rom_path(config.game)
    if rom is None:
        raise FileNotFoundError(f"this ale-py has no ROM of {config.game}")
    ale.loadROM(rom)

    policy = POLICIES[config.game]
    names, weights = tuple(policy), np.array(list(policy.values()))
    played = [getattr(Action, name) for name in names]
    rng = np.random.default_rng(config.seed)
    screens: list[np.ndarray] = []
    actions: list[int] = []
    starts: list[bool] = []

    def store(start: bool) -> None:
        screens.append(ale.getScreenRGB())
        starts.append(start)
        actions.append(-1)

    def taken(count: int) -> FrameData:
        frames = resize(torch.from_numpy(np.stack(screens[:count])).permute(0, 3, 1, 2), config.size)
        part = FrameData(frames, torch.tensor(actions[:count]), torch.tensor(starts[:count]), names, config)
        del screens[:count], actions[:count], starts[:count]
        return part

    def serve() -> None:
        if ale.game_over():
            ale.reset_game()
        if config.game == "breakout":
            ale.act(Action.FIRE)
        store(start=True)

    ale.reset_game()
    serve()
    lives = ale.lives()
    action = int(rng.choice(len(names), p=weights))
    for _ in tqdm(range(config.transitions), desc=f"playing {config.game}", disable=not progress, leave=False):
        if ale.game_over() or ale.lives() < lives:
            serve()
        lives = ale.lives()
        if rng.random() < 1 / config.mean_hold:
            action = int(rng.choice(len(names), p=weights))
        for _ in range(config.frame_skip):
            ale.act(played[action])
        actions[-1] = action
        store(start=False)
        if len(screens) > RESIZE_BATCH:  # the action on the last one is not known yet
            yield taken(len(screens) - 1)
    yield taken(len(screens))


def resize(frames: Tensor, size: int) -> Tensor:
    """(B, C, H, W) uint8 -> (B, C, size, size) uint8, each pixel the mean of the area that it covers."""
    return F.interpolate(frames.float(), (size, size), mode="area").round().to(torch.uint8)


def _expected_metadata(config: DataConfig) -> dict[str, str]:
    import ale_py

    return {
        "format": f"lamkernels frames {CACHE_VERSION}",
        "config": json.dumps(asdict(config), sort_keys=True),
        "policy": json.dumps(POLICIES[config.game]),
        "ale_py": ale_py.__version__,
    }


def _read(path: Path, config: DataConfig, expected: dict[str, str]) -> FrameData:
    """Raises ValueError when the file is not what ``config`` would collect."""
    tensors, metadata = load_tensors(path)
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise ValueError(f"{path} has {key} {metadata.get(key)!r}, not {value!r}")
    if tensors.keys() != {"frames", "actions", "starts"}:
        raise ValueError(f"{path} holds {sorted(tensors)}, not frames, actions and starts")
    frames, actions, starts = (tensors[name] for name in ("frames", "actions", "starts"))
    data = FrameData(frames, actions, starts, tuple(POLICIES[config.game]), config)
    if data.fingerprint() != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return data
