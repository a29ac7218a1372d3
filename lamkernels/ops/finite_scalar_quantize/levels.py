"""What the levels of finite scalar quantisation mean, for every backend: thresholds on x instead of a rounded tanh.

Rounding a bounded entry is a comparison of the entry with the points where the bound crosses a rounding edge. Those
points depend on the levels only, so they are computed here, once, in fp64, and no backend evaluates a tanh to quantise:
all of them return the same level, also next to an edge, where two tanh of different rounding would not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BOUNDED, SYMMETRIC, EVEN = range(3)  # what rounds: see bound
MARGIN = 1e-3  # by how much the bound of Mentzer et al. exceeds the outermost levels, relative to their distance


class Bound(NamedTuple):
    """One column of L levels: the code at position j is (j − offset) / half_width, from thresholds[j − 1] on.

    The straight-through gradient is that of the bound before it is rounded: slope · (1 − tanh²(x + shift)).
    """

    thresholds: tuple[float, ...]  # L − 1, increasing
    offset: float
    half_width: float
    slope: float
    shift: float

    @property
    def codes(self) -> list[float]:
        """The L values that an entry can take."""
        return [(j - self.offset) / self.half_width for j in range(len(self.thresholds) + 1)]


@functools.cache
def bound(levels: int, rounding: int) -> Bound:
    """BOUNDED: by Mentzer et al. 2023, appendix A.1. SYMMETRIC: tanh(x) rounded to L values in [−1, 1], a tie upwards.

    EVEN is SYMMETRIC with ties to the even position, as torch.round has them: x = 0, where L is even.
    """
    if rounding != BOUNDED:
        half = (levels - 1) / 2
        middles = [math.atanh((j - 0.5) / half - 1) for j in range(1, levels)]
        if rounding == EVEN and levels % 4 == 2:  # the even position is the lower one
            middles[levels // 2 - 1] = float(torch.finfo(torch.float32).tiny)
        return Bound(tuple(middles), half, half, 1.0, 0.0)
    width = levels // 2
    half, offset = (levels - 1) * (1 + MARGIN) / 2, 0.5 if levels % 2 == 0 else 0.0
    shift = math.atanh(offset / half)
    edges = tuple(math.atanh((j - width - 0.5 + offset) / half) - shift for j in range(1, levels))
    return Bound(edges, width, width, half / width, shift)


def strides(levels: tuple[int, ...]) -> list[int]:
    """What one step in each column adds to the index: the first column changes fastest."""
    return [math.prod(levels[:d]) for d in range(len(levels))]


@functools.cache
def tables(
    levels: tuple[int, ...], rounding: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bounds of all columns as tensors of a device, for rows of a dtype.

    Made on the first call for these levels: a CUDA graph is captured after a warm-up, as always.

    Returns:
        thresholds (D, P), fp32 or for fp64 rows fp64, P + 1 a power of two, the rest +inf; codes (D, P + 1) in
        ``dtype``; slopes and shifts (2, D) in the type of the thresholds; strides (D,) int64.
    """
    bounds = [bound(count, rounding) for count in levels]
    padded = (1 << (max(levels) - 1).bit_length()) - 1
    edges = torch.full((len(levels), padded), torch.inf, dtype=torch.float64, device="cpu")
    codes = torch.zeros((len(levels), padded + 1), dtype=torch.float64, device="cpu")
    for d, column in enumerate(bounds):
        edges[d, : len(column.thresholds)] = _on_host(column.thresholds)
        codes[d, : len(column.codes)] = _on_host(column.codes)
    slopes = torch.stack([_on_host([b.slope for b in bounds]), _on_host([b.shift for b in bounds])])
    if dtype != torch.float64:
        edges, slopes = _rounded_up(edges), slopes.float()
    steps = torch.tensor(strides(levels), dtype=torch.int64, device="cpu")
    return edges.to(device), codes.to(dtype).to(device), slopes.to(device), steps.to(device)


def _on_host(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")  # whatever the default device is


def _rounded_up(edges: Tensor) -> Tensor:
    """The least fp32 number at or above each: an fp32 entry is on the same side of it as of the edge."""
    wide = edges.numpy()
    single = wide.astype(np.float32)
    return torch.from_numpy(np.where(single < wide, np.nextafter(single, np.float32(np.inf)), single))
