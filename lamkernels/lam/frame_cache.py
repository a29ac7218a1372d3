"""The frames of any sources as one file of pixels, mapped into memory: training draws pairs from all of them at random.

Videos can only be read from their beginning, and frames of many do not fit into memory. So they are decoded once, at
the size at which the model sees them, into a file that the operating system pages in and out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lamkernels.lam.data import POLICIES, FrameData
from lamkernels.lam.files import load_tensors, save_tensors
from lamkernels.lam.fit import UnfitError, action_rows, file_stamps
from lamkernels.lam.sources import Source
from lamkernels.validation import check_integer, check_positive

log = logging.getLogger(__name__)

FORMAT = "lamkernels frame cache 2"
PIXELS, INDEX = "frames.u8", "frames.safetensors"
CHUNK = 2**24  # bytes


@dataclass(frozen=True)
class FramesConfig:
    """What decides the frames, together with the files.

    Attributes:
        sources: files and games, in order.
        side: S, to which frames are resized, pixels.
        lag: frames from o to o'.
        rows: name of the array of frames; None looks for the usual ones.
        actions: the same for the actions.
        num_actions: integer actions are below it.
        cache_gib: the most that the file of pixels takes, GiB; what does not fit is left out and reported.
    """

    sources: tuple[str, ...]
    side: int = 64
    lag: int = 1
    rows: str | None = None
    actions: str | None = None
    num_actions: int = 18
    cache_gib: float = 4.0

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError where a number is not one or out of range."""
        for name in ("side", "lag", "num_actions"):
            check_integer(name, getattr(self, name))
        check_positive("cache_gib", self.cache_gib)

    @property
    def frame_bytes(self) -> int:
        """Of one frame."""
        return 3 * self.side**2

    @property
    def limit(self) -> int:
        """The most frames that are kept."""
        return int(self.cache_gib * 2**30 / self.frame_bytes)


@dataclass(frozen=True)
class Part:
    """The frames of one source, whose pixels have the checksum ``sha256``."""

    source: str
    start: int
    count: int
    sha256: str


@dataclass(frozen=True)
class CachedFrames:
    """Frames on disk, and what is known of them.

    Attributes:
        data: its ``frames`` are mapped from the file; its ``actions`` are −1 where actions are not integers.
        action_rows: (T, A) float32: the actions, integers one-hot; NaN where there is none. None without any.
        exogenous: (T, n) float32: the state of what the agent does not control, NaN where it is not known. None without
            any.
        parts: the sources, in order, without those of no frame.
        skipped: what was not read to its end: (source, reason).
    """

    data: FrameData
    action_rows: Tensor | None
    exogenous: Tensor | None
    parts: tuple[Part, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass
class _Index:
    """What is in the cache so far."""

    done: int = 0  # sources
    parts: list[Part] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)
    actions: list[Tensor | None] = field(default_factory=list)  # (N, A) of as many frames as the starts, or None
    exogenous: list[Tensor | None] = field(default_factory=list)  # (N, n), the same
    integers: bool = False  # the actions are

    @property
    def frames(self) -> int:
        return sum(part.count for part in self.parts)


def cached_frames(
    config: FramesConfig, folder: Path, *, restart: bool = False, checkpoint_seconds: float = 60.0, read: bool = True
) -> CachedFrames:
    """The frames of ``config``, from ``folder`` where they are there and sound, else read and written there.

    A source that cannot be read is skipped. Reading that was stopped goes on after the last source that was saved.

    Args:
        config: what to read.
        folder: of the cache, two files.
        restart: whether to read anew where the cache is of other data, which is an error otherwise.
        checkpoint_seconds: between two savings of what has been read so far.
        read: False expects a whole cache, which another process has just made, and trusts it.

    Raises:
        ValueError: there is no frame, or the cache is of other data.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = json.dumps({"format": FORMAT, "config": asdict(config), "files": file_stamps(config.sources)})
    index = _Index()
    if (folder / INDEX).exists():
        index = _load(folder, stamp, restart)
        if restart and any(reason != _full(config, config.limit) for _, reason in index.skipped):
            index = _Index()  # what could not be read then may be readable now
        if read and not _sound(folder / PIXELS, index, config.frame_bytes):
            log.warning("the cached frames in %s are damaged: reading the sources again", folder)
            index = _Index()
    if read and index.done < len(config.sources):
        _read(config, folder, stamp, index, checkpoint_seconds)
    return _opened(config, folder / PIXELS, index)


def _read(config: FramesConfig, folder: Path, stamp: str, index: _Index, checkpoint_seconds: float) -> None:
    from tqdm import tqdm

    limit, saved = config.limit, time.monotonic()
    with (folder / PIXELS).open("r+b" if index.done else "wb") as file, tqdm(unit=" frames", disable=None) as bar:
        file.truncate(index.frames * config.frame_bytes)  # of a source that was not read to its end
        file.seek(0, 2)
        for number in range(index.done, len(config.sources)):
            bar.set_description(f"reading {Path(config.sources[number]).name}")
            if index.frames < limit:
                _add(config, number, limit, file, index, bar.update)
            else:
                index.skipped.append((config.sources[number], _full(config, limit)))
            index.done = number + 1
            if time.monotonic() - saved > checkpoint_seconds or index.done == len(config.sources):
                file.flush()
                _save(folder / INDEX, stamp, index)
                saved = time.monotonic()


def _add(
    config: FramesConfig, number: int, limit: int, file: IO[bytes], index: _Index, tell: Callable[[int], object]
) -> None:
    """Appends the frames of one source, up to ``limit`` frames in all."""
    name, start, digest, count = config.sources[number], index.frames, hashlib.sha256(), 0
    source = Source(name, side=config.side, rows=config.rows, actions=config.actions)
    try:
        for batch in source.frames():
            frames = batch.rows[: limit - start - count]
            actions, state = _checked(config, index, batch.actions), _checked_state(index, batch.exogenous)
            pixels = frames.contiguous().numpy().tobytes()
            file.write(pixels)
            digest.update(pixels)
            count += len(frames)
            index.starts.append(batch.starts[: len(frames)])
            index.actions.append(None if actions is None else actions[: len(frames)])
            index.exogenous.append(None if state is None else state[: len(frames)])
            tell(len(frames))
            if len(frames) < len(batch.rows):
                index.skipped.append((name, f"from frame {count} on: {_full(config, limit)}"))
                break
    except UnfitError as error:
        index.skipped.append((name, str(error)))
    index.skipped += [(skipped.source, skipped.reason) for skipped in source.skipped]
    if count:
        index.parts.append(Part(name, start, count, digest.hexdigest()))


def _checked(config: FramesConfig, index: _Index, actions: Tensor | None) -> Tensor | None:
    """The actions (N, A) of a batch, which go with those before."""
    if actions is None:
        return None
    rows = action_rows(actions, config.num_actions).float()
    width = _width(index.actions)
    integers = not actions.is_floating_point() and actions[0].numel() == 1
    if width is not None and (rows.shape[1] != width or integers != index.integers):
        raise UnfitError(f"its actions have {rows.shape[1]} entries, those before {width}")
    index.integers = integers
    if integers:  # −1, no action, is zeros
        rows = rows.where(rows.any(1, keepdim=True), torch.nan)
    return rows


def _checked_state(index: _Index, state: Tensor | None) -> Tensor | None:
    """The exogenous state (N, n) of a batch, which goes with those before."""
    if state is None:
        return None
    rows, width = state.reshape(len(state), -1).float(), _width(index.exogenous)
    if width is not None and rows.shape[1] != width:
        raise UnfitError(f"its exogenous state has {rows.shape[1]} entries, those before {width}")
    return rows.where(rows.isfinite(), torch.nan)


def _width(known: list[Tensor | None]) -> int | None:
    return next((rows.shape[1] for rows in known if rows is not None), None)


def _full(config: FramesConfig, limit: int) -> str:
    return f"the cache is full: {limit} frames, {config.cache_gib:g} GiB; --cache-gib allows more"


def _opened(config: FramesConfig, path: Path, index: _Index) -> CachedFrames:
    if not index.frames:
        reasons = "; ".join(f"{source}: {reason}" for source, reason in index.skipped)
        raise ValueError(f"no frames could be read; {reasons or 'the sources are empty'}")
    count = index.frames
    frames = torch.from_file(str(path), size=count * config.frame_bytes, dtype=torch.uint8)  # read, never written
    rows, numbers = _joined(index.starts, index.actions), torch.full((count,), -1)
    if rows is not None and index.integers:
        known = ~rows.isnan().any(1)
        numbers[known] = rows[known].argmax(1)
    data = FrameData(
        frames.view(count, 3, config.side, config.side), numbers, torch.cat(index.starts),
        _action_names(config, index), config, config.lag,
    )  # fmt: skip
    state = _joined(index.starts, index.exogenous)
    return CachedFrames(data, rows, state, tuple(index.parts), tuple(index.skipped))


def _joined(starts: list[Tensor], known: list[Tensor | None]) -> Tensor | None:
    """What is known of all frames, NaN where it is not."""
    width = _width(known)
    if width is None:
        return None
    return torch.cat(
        [
            torch.full((len(own), width), torch.nan) if rows is None else rows
            for own, rows in zip(starts, known, strict=True)
        ]
    )


def _action_names(config: FramesConfig, index: _Index) -> tuple[str, ...]:
    """Names of integer actions: those of the game where all frames are of one."""
    if not index.integers:
        return ()
    games = set(config.sources)
    if len(games) == 1 and (game := games.pop()).startswith("atari:"):
        return tuple(POLICIES[game[6:]])
    return tuple(f"action {number}" for number in range(config.num_actions))


def _save(path: Path, stamp: str, index: _Index) -> None:
    tensors = {"starts": torch.cat([torch.zeros(0, dtype=torch.bool), *index.starts])}
    for name, known in (("actions", index.actions), ("exogenous", index.exogenous)):
        rows = _joined(index.starts, known)
        if rows is not None:
            tensors[name] = rows
    state = {"done": index.done, "integers": index.integers, "skipped": index.skipped,
             "parts": [asdict(part) for part in index.parts]}  # fmt: skip
    save_tensors(path, tensors, {"stamp": stamp, "index": json.dumps(state)})


def _load(folder: Path, stamp: str, restart: bool) -> _Index:
    try:
        tensors, metadata = load_tensors(folder / INDEX)
    except ValueError as error:
        if restart:
            return _Index()
        raise ValueError(f"{error}; --restart forgets it") from error
    if metadata.get("stamp") != stamp:
        if restart:
            return _Index()
        raise ValueError(f"{folder / INDEX} is of another fit, or a source has changed since; --restart forgets it")
    state: dict[str, Any] = json.loads(metadata["index"])
    parts = [Part(**part) for part in state["parts"]]
    return _Index(state["done"], parts, [(source, reason) for source, reason in state["skipped"]],
                  [tensors["starts"]], [tensors.get("actions")], [tensors.get("exogenous")],
                  state["integers"])  # fmt: skip


def _sound(path: Path, index: _Index, frame_bytes: int) -> bool:
    """Whether the file holds the pixels of the index."""
    if not path.exists() or path.stat().st_size < index.frames * frame_bytes:
        return not index.frames
    with path.open("rb") as file:
        for part in index.parts:
            digest, left = hashlib.sha256(), part.count * frame_bytes
            while left:
                content = file.read(min(CHUNK, left))
                digest.update(content)
                left -= len(content)
            if digest.hexdigest() != part.sha256:
                return False
    return True


def segments(cached: CachedFrames, rows: int, every: int) -> Tensor:
    """(T,) bool: the frames of every ``every``-th segment of ``rows`` frames; of source i, segment j with i + j."""
    held = [
        (torch.arange(part.count) // rows + number) % every == every - 1 for number, part in enumerate(cached.parts)
    ]
    return torch.cat(held)
