"""LeRobot data sets, codebase versions 2.x and 3.0: the frames of one camera with the actions of the Parquet files.

A data set is a folder with ``meta/info.json``. In version 2 a video and a Parquet file hold one episode each; in
version 3 they hold many, and ``meta/episodes`` says which and where.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamkernels.lam.parquet import column, package

INFO, DEPTH = Path("meta/info.json"), 5  # a video is at most so many folders below its data set


def is_dataset(folder: Path) -> bool:
    """Whether it is one."""
    return (folder / INFO).is_file()


def root_of(video: Path) -> Path | None:
    """The data set that a video belongs to, if it is one of a data set."""
    video = video.absolute()
    for depth, parent in enumerate(video.parents):
        if depth > DEPTH:
            break
        if video.relative_to(parent).parts[0] == "videos" and is_dataset(parent):
            return parent
    return None


def files(root: Path, *, rows: str | None = None, camera: str | None = None) -> list[str]:
    """The videos of a camera, in the order of their names; the Parquet files where there is no camera.

    Args:
        root: of the data set.
        rows: a column of the Parquet files that is asked for instead.
        camera: the name of the camera or its last part; None takes the first.

    Raises:
        ValueError: ``meta/info.json`` is damaged, there is no such camera, or no file.
    """
    cameras = [name for name, feature in _info(root)["features"].items() if feature.get("dtype") == "video"]
    if camera is not None:
        chosen = [name for name in cameras if camera in (name, name.rpartition(".")[2])]
        if len(chosen) != 1:
            raise ValueError(f"the data set {root} has the cameras {', '.join(cameras) or 'none'}, and not {camera}")
        cameras = chosen
    if rows is None and cameras:
        found = sorted(path for path in (root / "videos").rglob("*.mp4") if cameras[0] in path.parent.parts)
    else:
        found = sorted((root / "data").rglob("*.parquet"))
    if not found:
        raise ValueError(f"the data set {root} has no file of {cameras[0] if rows is None and cameras else 'data'}")
    return [str(path) for path in found]


def paired(
    parts: Iterator[dict[str, Tensor]], root: Path, video: Path, action_names: Sequence[str], needed: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The parts of a video, {"rows": (N, ...)}, with "episodes" (N,) int64 and, where there are some, "actions" (N, A).

    Args:
        parts: consecutive frames, from the first on.
        root: of the data set.
        video: one of its videos.
        action_names: what the column of actions may be called.
        needed: whether there must be one.

    Raises:
        ValueError: the Parquet files have more or fewer rows than the video has frames, or do not say which.
    """
    columns = _columns(root, video, action_names)
    if needed and "actions" not in columns:
        raise ValueError(f"the data set {root} has no column {' or '.join(action_names)}")
    count, done = len(columns["episodes"]), 0
    frames = _frame_count(video)
    if frames and frames != count:  # some containers do not say
        raise ValueError(f"it has {frames} frames, and the Parquet files have {count} rows for it")
    for part in parts:
        stop = done + len(part["rows"])
        if stop > count:
            raise ValueError(f"it has more frames than the {count} rows that the Parquet files have for it")
        yield part | {name: values[done:stop] for name, values in columns.items()}
        done = stop
    if done < count:
        raise ValueError(f"it has {done} frames, and the Parquet files have {count} rows for it")


def _info(root: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads((root / INFO).read_text(encoding="utf-8"))
        info["features"].items()
        return info | {"version": int(info["codebase_version"].lstrip("v").partition(".")[0])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root / INFO} is not that of a LeRobot data set: {type(error).__name__}: {error}") from error


def _frame_count(video: Path) -> int:
    with package("av", "av", video).open(str(video)) as container:
        return int(container.streams.video[0].frames) if container.streams.video else 0


def _columns(root: Path, video: Path, action_names: Sequence[str]) -> dict[str, Tensor]:
    """The episodes and actions of the frames of a video, in their order."""
    info = _info(root)
    if info["version"] not in (2, 3):
        raise ValueError(f"the data set {root} is of version {info['codebase_version']}; 2.x and 3.0 are known")
    if info["version"] == 2:
        episode = int(video.stem.rpartition("_")[2])
        chunk = episode // int(info.get("chunks_size", 1000))
        places = [(episode, info["data_path"].format(episode_chunk=chunk, episode_index=episode))]
    else:
        places = _places(root, video, info)
    tables: dict[str, dict[str, Tensor]] = {}
    pieces = []
    for episode, place in places:
        if place not in tables:
            tables[place] = _table(root / place, action_names)
        table = tables[place]
        chosen = (table["episode_index"] == episode).nonzero().squeeze(1)
        order = chosen[table["frame_index"][chosen].argsort()]
        if not torch.equal(table["frame_index"][order], torch.arange(len(order))) or not len(order):
            raise ValueError(f"{root / place} does not have the frames of episode {episode} one after another")
        piece = {"episodes": table["episode_index"][order]}
        pieces.append(piece | ({"actions": table["actions"][order]} if "actions" in table else {}))
    if not pieces:
        raise ValueError("no episode of the data set is in it")
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _places(root: Path, video: Path, info: dict[str, Any]) -> list[tuple[int, str]]:
    """The episodes in a video of version 3, in order, and the Parquet file of each."""
    parquet = package("pyarrow.parquet", "pyarrow", video)
    key, chunk, file = video.parent.parent.name, int(video.parent.name.split("-")[1]), int(video.stem.split("-")[1])
    found = []
    for path in sorted((root / "meta" / "episodes").rglob("*.parquet")):
        names = ("chunk_index", "file_index", "from_timestamp")
        wanted = ["episode_index", "data/chunk_index", "data/file_index", *(f"videos/{key}/{name}" for name in names)]
        for row in parquet.read_table(path, columns=wanted).to_pylist():
            if (row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"]) == (chunk, file):
                numbers = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
                place = info["data_path"].format(**numbers)
                found.append((row[f"videos/{key}/from_timestamp"], row["episode_index"], place))
    return [(episode, place) for _, episode, place in sorted(found)]


def _table(path: Path, action_names: Sequence[str]) -> dict[str, Tensor]:
    parquet = package("pyarrow.parquet", "pyarrow", path)
    there = parquet.read_schema(path).names
    action = next((name for name in action_names if name in there), None)
    wanted = {"episode_index": "episode_index", "frame_index": "frame_index"} | ({"actions": action} if action else {})
    table = parquet.read_table(path, columns=list(wanted.values()))
    return {name: column(table.column(source).combine_chunks()) for name, source in wanted.items()}
