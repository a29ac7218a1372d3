"""The frames of a video, and whether it has all that it says it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamkernels.lam.parquet import package

VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".webm")


def video_parts(path: Path, side: int, entries: int) -> Iterator[dict[str, Tensor]]:
    """Every frame of the first video stream, RGB, {"rows": (N, side, side, 3) uint8}, about ``entries`` numbers each.

    Decoders pass over what is damaged and stop where a file was cut off, without a word; times tell. {"starts": (N,)
    bool} are the frames behind a gap, which do not follow those before it.

    Raises:
        ValueError: there is no such stream, or, after its last frame, something was missing.
    """
    av = package("av", "av", path)
    frames: list[Tensor] = []
    starts: list[bool] = []
    gaps: list[str] = []

    def part() -> dict[str, Tensor]:
        made = {"rows": torch.stack(frames), "starts": torch.tensor(starts)}
        frames.clear()
        starts.clear()
        return made

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        end = float((stream.start_time or 0) * stream.time_base)
        length = _length(container, av.time_base)
        usual = 1.0 if length is None else min(1.0, 0.1 * length)  # what may be missing: a frame or two, of rounding
        usual += float(1 / stream.average_rate) if stream.average_rate else 0.1
        length = None if length is None else end + length

        def missing(until: float) -> bool:
            if until - end > usual:
                gaps.append(f"from {end:.1f} to {until:.1f} s")
            return until - end > usual

        timed = False
        for frame in container.decode(video=0):
            pixels = frame.to_ndarray(width=side, height=side, format="rgb24", interpolation="AREA")
            frames.append(torch.from_numpy(pixels))
            starts.append(frame.time is not None and missing(frame.time))
            if frame.time is not None:
                timed = True
                end = frame.time + float((frame.duration or 0) * frame.time_base)
            if (len(frames) + 1) * pixels.size > entries:
                yield part()
    if frames:
        yield part()
    if timed and length is not None:
        missing(length)
    if gaps:
        raise ValueError(f"nothing could be read {', '.join(gaps)}; what could is taken")


def _length(container: Any, time_base: int) -> float | None:
    """Of the video, seconds; None where the file does not say."""
    stream = container.streams.video[0]
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:  # of several, that of the longest
        return float(container.duration / time_base)
    return None
