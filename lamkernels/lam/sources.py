"""Frames and features from files, as batches of rows in bounded memory: arrays, Parquet, videos, Atari games."""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamkernels.lam import lerobot
from lamkernels.lam.data import DataConfig, play, resize
from lamkernels.lam.parquet import parquet_parts
from lamkernels.lam.videos import VIDEOS, video_parts
from lamkernels.validation import check_integer

log = logging.getLogger(__name__)

# what a file's arrays or columns may be called, in the order in which they are looked for
NAMES = {
    "rows": ("rows", "frames", "features", "observation.state"),
    "actions": ("actions", "action"),
    "starts": ("starts",),
    "episodes": ("episodes", "episode_index"),
    "exogenous": ("exogenous",),
}
ARRAYS = (".npy", ".npz", ".safetensors")
KINDS = (*ARRAYS, ".parquet", *VIDEOS)
CHANNELS = (1, 3, 4)  # of images
BATCH_ENTRIES = 2**22  # 16 MiB of float32

Part = dict[str, Tensor]  # "rows" and perhaps the other NAMES: equally many consecutive rows of a file


class Batch(NamedTuple):
    """Rows that follow those of the batch before.

    Attributes:
        rows: (N, D) float32: one frame or feature vector each, flattened; uint8 is scaled to [0, 1]. From
            :meth:`Source.frames` (N, 3, side, side) uint8.
        starts: (N,) bool: the first row of an episode. The first row of a file is one.
        actions: (N,) or (N, A), in the dtype of the file: what led from a row to the next; None where there are none.
        source: the file or the game.
        exogenous: (N,) or (N, n), in the dtype of the file: the state of what the agent does not control; None where it
            is not known.
    """

    rows: Tensor
    starts: Tensor
    actions: Tensor | None
    source: str
    exogenous: Tensor | None = None


class Skipped(NamedTuple):
    """A file that was not read to its end, and why."""

    source: str
    reason: str


class Source:
    """Batches of rows from files, folders and Atari games, one after another; it can be iterated over again.

    A file holds "rows", "frames", "features" or "observation.state", (T, ...), or a single array of any name. It may
    hold "actions" or "action" (T, ...), an "exogenous" state (T, ...), and its episodes as "starts" (T,) bool or as
    "episodes" or "episode_index" (T,) numbers; without them it is one episode. The Parquet files of LeRobot are read as
    they are, and the videos of its data sets (:mod:`lamkernels.lam.lerobot`) with the actions and the episodes of their
    frames.

    A file that cannot be read, or whose rows have another length than those before, is reported in ``skipped`` and in
    the log, and the next one is taken. Rows that came out of it before it broke remain, and are an episode's beginning.

    Args:
        paths: files (.npy, .npz, .safetensors, .parquet, .avi, .mkv, .mov, .mp4, .webm), folders, of which the files of
            these kinds are taken in the order of their names, of a LeRobot data set the videos of one camera (its
            Parquet files where it has none, or ``rows`` names one of their columns), and games ("atari:breakout";
            :func:`play`).
        side: height and width to which the frames of videos and games are resized, pixels; and frames of arrays that
            are larger, (T, H, W, C) or (T, C, H, W) uint8 with 1, 3 or 4 channels.
        rows: the name of the array or column of rows; None looks for the names above.
        actions: the same of the actions.
        camera: of LeRobot data sets, "observation.images.top" or only "top"; None takes the first.
        batch_entries: the most entries of a batch of more than one row.

    Attributes:
        skipped: a :class:`Skipped` for each file that the last iteration did not read to its end.

    Raises:
        TypeError: side or batch_entries is not an int.
        ValueError: it is below 1, a file is of another kind, a folder has no file of these kinds, or a game is unknown.
        FileNotFoundError: there is no such file or folder.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        side: int = 64,
        rows: str | None = None,
        actions: str | None = None,
        camera: str | None = None,
        batch_entries: int = BATCH_ENTRIES,
    ) -> None:
        check_integer("side", side)
        check_integer("batch_entries", batch_entries)
        self._side, self._batch_entries = side, batch_entries
        self._asked = {kind: name for kind, name in (("rows", rows), ("actions", actions)) if name is not None}
        self._names = {kind: (self._asked[kind],) if kind in self._asked else NAMES[kind] for kind in NAMES}
        self._single = rows is None  # then a single array is taken whatever its name
        self._sources = expanded(paths, rows=rows, camera=camera)
        self._games = {
            name: DataConfig(game=name[6:], size=side) for name in self._sources if name.startswith("atari:")
        }
        self.skipped: list[Skipped] = []

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of every file.

        Raises:
            ModuleNotFoundError: a kind of file needs a package that is not installed.
        """
        return self._read(_as_rows)

    def frames(self) -> Iterator[Batch]:
        """Yields the batches of every file as pictures: rows (N, 3, side, side) uint8, RGB.

        Videos and games are; of arrays those that are (T, H, W, C), (T, C, H, W) or, as grey levels, (T, H, W), uint8
        or floating point in [0, 1]. Others are skipped. A fourth channel, of opacity, is left out.

        Raises:
            ModuleNotFoundError: a kind of file needs a package that is not installed.
        """
        return self._read(partial(_as_frames, side=self._side))

    def _read(self, convert: Callable[[Tensor], Tensor]) -> Iterator[Batch]:
        self.skipped, width = [], None
        for source in self._sources:
            episode = None
            try:
                for part in self._parts(source):
                    rows = convert(part["rows"])
                    width = width or rows.shape[1]
                    if rows.shape[1] != width:
                        raise ValueError(f"its rows have {rows.shape[1]} entries, those before have {width}")
                    starts, episode = _starts(part, episode)
                    yield Batch(rows, starts, part.get("actions"), source, part.get("exogenous"))
            except (ModuleNotFoundError, MemoryError):
                raise
            except Exception as error:  # what a damaged file raises is up to the library that reads it
                self.skipped.append(Skipped(source, f"{type(error).__name__}: {error}"))
                log.warning("skipped %s: %s", source, self.skipped[-1].reason)

    def _parts(self, source: str) -> Iterator[Part]:
        path = Path(source)
        suffix = path.suffix.lower()
        if source in self._games:
            return self._game(self._games[source])
        if suffix in VIDEOS:
            parts = video_parts(path, self._side, self._batch_entries)
            root = lerobot.root_of(path)
            if root is None:
                return parts
            return lerobot.paired(parts, root, path, self._names["actions"], "actions" in self._asked)
        if suffix == ".parquet":
            return parquet_parts(path, self._chosen, self._batch_entries)
        return self._array_file(path)

    def _game(self, config: DataConfig) -> Iterator[Part]:
        for played in play(config):
            frames = played.frames.permute(0, 2, 3, 1)  # as those of videos
            arrays = {"rows": frames, "actions": played.actions, "starts": played.starts}
            yield from self._slices({name: Array(tensor.shape, _slicer(tensor)) for name, tensor in arrays.items()})

    def _chosen(self, names: Iterable[str], *, single: bool = False) -> dict[str, str]:
        """The names in a file that stand for rows, actions, starts and episodes."""
        there = list(names)
        chosen = {
            kind: next(name for name in wanted if name in there)
            for kind, wanted in self._names.items()
            if set(wanted) & set(there)
        }
        if single and self._single and len(there) == 1:
            chosen = {"rows": there[0]}
        for kind, name in self._asked.items():
            if name not in there:
                raise ValueError(f"it holds {', '.join(there) or 'nothing'}, but not {name} for the {kind}")
        if "rows" not in chosen:
            raise ValueError(f"it holds {', '.join(there) or 'nothing'}, but not {' or '.join(self._names['rows'])}")
        return chosen

    def _array_file(self, path: Path) -> Iterator[Part]:
        with ExitStack() as stack:
            opened = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}[path.suffix.lower()]
            arrays = opened(path, stack)
            chosen = self._chosen(arrays, single=True)
            yield from self._slices({kind: arrays[name]() for kind, name in chosen.items()})

    def _slices(self, arrays: Mapping[str, Array]) -> Iterator[Part]:
        shape = arrays["rows"].shape
        for kind, array in arrays.items():
            if not array.shape or array.shape[0] != shape[0]:
                raise ValueError(f"its {kind} have shape {array.shape} and its rows {shape}")
        step = max(1, self._batch_entries // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            part = {kind: array.read(start, min(start + step, shape[0])) for kind, array in arrays.items()}
            yield part | {"rows": _fitted(part["rows"], self._side)}


class Array(NamedTuple):
    """An array in a file: its shape, and ``read(start, stop)``, called for one range of rows after another."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]


def expanded(
    paths: str | Path | Sequence[str | Path], *, rows: str | None = None, camera: str | None = None
) -> list[str]:
    """The files and games that paths stand for, as :class:`Source` says.

    Raises:
        ValueError: a file is of another kind, or a folder has no file of these kinds.
        FileNotFoundError: there is no such file or folder.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = {source if source.startswith("atari:") else str(Path(source).resolve()): source
             for path in given for source in _files(str(path), rows, camera)}  # fmt: skip
    return list(found.values())  # each once: what is held out of one copy would be trained on in the other


def _files(path: str, rows: str | None, camera: str | None) -> list[str]:
    """The files of a folder, or the file or game itself."""
    if path.startswith("atari:"):
        return [path]
    if lerobot.is_dataset(Path(path)):
        return lerobot.files(Path(path), rows=rows, camera=camera)
    if Path(path).is_dir():
        files = sorted(str(file) for file in Path(path).iterdir() if _known(file) and file.is_file())
        if not files:
            raise ValueError(f"the folder {path} has no file of the kinds {', '.join(KINDS)}")
        return files
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not _known(Path(path)):
        raise ValueError(f"the file {path} is of no known kind; these are {', '.join(KINDS)}")
    return [path]


def _known(file: Path) -> bool:
    return file.suffix.lower() in KINDS  # cameras write .MP4


def _as_rows(values: Tensor) -> Tensor:
    """(N, ...) -> (N, D) float32; uint8, the type of pixels, from [0, 255] to [0, 1]."""
    if values.is_complex() or not values.numel():
        raise ValueError(f"its rows are {values.dtype} of shape {tuple(values.shape[1:])}")
    rows = values.reshape(len(values), -1).float()
    return rows / 255 if values.dtype == torch.uint8 else rows


def _as_frames(values: Tensor, *, side: int) -> Tensor:
    """Pictures (N, H, W), (N, H, W, C) or (N, C, H, W) -> (N, 3, side, side) uint8."""
    planes = values[:, None] if values.ndim == 3 else values
    if planes.ndim != 4 or not values.numel() or not {planes.shape[1], planes.shape[3]} & set(CHANNELS):
        raise ValueError(
            f"its rows are {values.dtype} of shape {tuple(values.shape[1:])}; frames are (H, W, C) or (C, H, W) with "
            f"{', '.join(map(str, CHANNELS))} channels: features and vectors are for the linear model"
        )
    if planes.shape[1] not in CHANNELS or (planes.shape[3] in CHANNELS and planes.shape[1] > planes.shape[3]):
        planes = planes.permute(0, 3, 1, 2)
    if planes.dtype != torch.uint8:
        if not planes.is_floating_point() or not bool(((planes >= 0) & (planes <= 1)).all()):
            raise ValueError(f"its frames are {values.dtype}; they must be uint8, or floating point in [0, 1]")
        planes = (255 * planes.float()).round().to(torch.uint8)
    planes = planes.expand(-1, 3, -1, -1) if planes.shape[1] == 1 else planes[:, :3]
    return planes if planes.shape[2:] == (side, side) else resize(planes, side)


def _fitted(frames: Tensor, side: int) -> Tensor:
    """Frames that are larger than ``side``, uint8 with channels first or last, resized to it; others as they are."""
    if frames.dtype != torch.uint8 or frames.ndim != 4:
        return frames
    last = frames.shape[3] in CHANNELS
    planes = frames.permute(0, 3, 1, 2) if last else frames
    if planes.shape[1] not in CHANNELS or max(planes.shape[2:]) <= side:
        return frames
    planes = resize(planes, side)
    return planes.permute(0, 2, 3, 1) if last else planes


def _starts(part: Part, episode: Tensor | None) -> tuple[Tensor, Tensor]:
    """The starts of a part, and the episode of its last row; ``episode`` is that of the row before, if there is one."""
    count = len(part["rows"])
    starts = torch.zeros(count, dtype=torch.bool)
    if "episodes" in part:
        numbers = part["episodes"].reshape(count)
        starts[1:] = numbers[1:] != numbers[:-1]
        starts[0] = episode is None or bool(numbers[0] != episode)
        episode = numbers[-1]
    else:
        starts[0] = episode is None
        episode = torch.zeros(())
    if "starts" in part:
        starts |= part["starts"].reshape(count).bool()
    return starts, episode


def _slicer(values: Any) -> Callable[[int, int], Tensor]:
    """Reads a range of rows of a tensor, of an array (as a copy, in the byte order of this machine), or of a slice."""

    def read(start: int, stop: int) -> Tensor:
        part = values[start:stop]
        return part if isinstance(part, Tensor) else torch.from_numpy(part.astype(part.dtype.newbyteorder("=")))

    return read


Arrays = Mapping[str, Callable[[], Array]]  # the arrays of a file, looked at when they are needed


def _open_npy(path: Path, stack: ExitStack) -> Arrays:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.flags.c_contiguous:  # read, not mapped: pages that were looked at would count as memory of the process
        return {"rows": lambda: _npz_member(stack.enter_context(path.open("rb")))}
    return {"rows": lambda: Array(array.shape, _slicer(array))}


def _open_npz(path: Path, stack: ExitStack) -> Arrays:
    """Reads while it unpacks: ``np.load`` would unpack a whole array into memory."""
    archive = stack.enter_context(zipfile.ZipFile(path))

    def array(name: str) -> Array:
        return _npz_member(stack.enter_context(archive.open(name)))

    return {name.removesuffix(".npy"): partial(array, name) for name in archive.namelist()}


def _npz_member(file: IO[bytes]) -> Array:
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = header(file)
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError("it holds Python objects" if dtype.hasobject else "its arrays are stored column by column")

    def read(start: int, stop: int) -> Tensor:
        wanted = (stop - start) * math.prod(shape[1:]) * dtype.itemsize
        content = file.read(wanted)
        if len(content) < wanted:
            raise ValueError("it ends in the middle of an array")
        values = np.frombuffer(content, dtype).reshape(stop - start, *shape[1:])
        return torch.from_numpy(values.astype(dtype.newbyteorder("=")))

    return Array(shape, read)


def _open_safetensors(path: Path, stack: ExitStack) -> Arrays:
    from safetensors import safe_open

    file = stack.enter_context(safe_open(path, framework="pt"))

    def array(name: str) -> Array:
        values = file.get_slice(name)
        return Array(tuple(values.get_shape()), _slicer(values))

    return {name: partial(array, name) for name in file.keys()}  # noqa: SIM118
