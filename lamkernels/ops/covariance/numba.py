"""covariance on the CPU: scatters and cross scatters over :mod:`products`, and what its fast path must not decide."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamkernels.ops.covariance.products import Rows, add_up, computed_dtype
from lamkernels.ops.covariance.reference import effective_weights, pairs

SAMPLE = 1 << 18  # entries that the provisional mean is computed from
FEW = 256  # pairs whose roundings do not average out: fp64
# |x − shift| between these does not overflow or vanish in fp32: 64 times 2⁵⁸ squared
LARGEST, SMALLEST = 2.0**58, 2.0**-50


class Scatter(NamedTuple):
    """Weight, mean (D,) fp64 and centred scatter (D, D) fp64 of rows."""

    weight: float
    mean: Tensor
    scatter: Tensor

    def shift(self, dtype: torch.dtype) -> Tensor:
        """What to subtract from the rows before products in ``dtype``."""
        return on_grid(self.mean, self.scatter.diagonal() / (self.weight or 1.0), dtype)

    def merged(self, other: Scatter) -> Scatter:
        """Of the rows of both (Chan, Golub and LeVeque 1983)."""
        weight = self.weight + other.weight
        share = other.weight / (weight or 1.0)
        step = other.mean - self.mean
        between = math.sqrt(self.weight * share) * step
        scatter = torch.outer(between, between).add_(self.scatter).add_(other.scatter)  # symmetric, unlike addr
        return Scatter(weight, self.mean + share * step, scatter)


def scatter(x: Tensor, weights: Tensor | None, exact: bool, numbers: Tensor | None = None) -> tuple[Scatter, float]:
    """The scatter of the rows of positive weight, and their largest entry about the shift."""
    shift, dtype = provisional_shift(x, weights, numbers, exact), computed_dtype(x, exact)
    count = x.shape[0] if numbers is None else numbers.shape[0]
    weight = float(count) if weights is None else float(weights.numpy().sum())  # torch's sum depends on the threads
    for _ in range(2):
        centred, step, largest = add_up(Rows(x, shift), None, weight, numbers, weights, exact)
        result = Scatter(weight, shift + step, centred)
        # once more about the mean, where the rows that the shift comes from were not like the others
        if not weight * float(step.square().sum()) > float(centred.trace()) / math.sqrt(x.shape[1]):
            break
        shift = result.shift(dtype)
    return result, largest


def provisional_shift(x: Tensor, weights: Tensor | None, numbers: Tensor | None, exact: bool) -> Tensor:
    """:func:`on_grid` of the mean of evenly spaced rows of positive weight."""
    if weights is not None and numbers is None:
        numbers = weights.nonzero()[:, 0]
    count = x.shape[0] if numbers is None else numbers.shape[0]
    step = max(1, count // max(256, SAMPLE // x.shape[1]))
    sample = (x[::step] if numbers is None else x[numbers[::step]]).double()
    if not sample.shape[0]:
        return sample.sum(0)
    with np.errstate(all="ignore"):  # rows that are not finite are found later
        # NumPy's sums: torch's may depend on the number of threads
        mean, variance = (torch.from_numpy(statistic(0)) for statistic in (sample.numpy().mean, sample.numpy().var))
    return on_grid(mean, variance, computed_dtype(x, exact))


def on_grid(mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean to within 1/16 of the spread, (D,) fp64 with values of ``dtype``.

    Rounded to a multiple of 2^(⌈log2 rms⌉ − 4): rows of integers, pixels or halves stay on their grid, and their
    products are exact in fp32. Off it, equal entries give equal products, whose roundings do not average out.
    """
    unit = torch.exp2(variance.sqrt().log2().ceil() - 4)
    usable = (unit > 0) & (unit < torch.inf)
    return torch.where(usable, (mean / unit).round() * unit, mean).to(dtype).double()


def moments(
    x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, exact: bool
) -> tuple[Scatter, Scatter, Tensor, float]:
    """Scatters of the first and of the second rows, their cross scatter, and the largest entry about a shift."""
    if not lag:
        first, largest = scatter(x, weights, exact)
        if y is None:
            none = [torch.empty(shape, dtype=torch.float64) for shape in ((0,), (0, 0), (x.shape[1], 0))]
            return first, Scatter(first.weight, *none[:2]), none[2], largest
        second, other = scatter(y, weights, exact)
        return first, second, cross(x, y, first, second, weights, exact), max(largest, other)
    # what a row weighs in both roles counts once for both, and what it weighs in one alone is added: no cancellation
    rows, count = x.shape[0], max(x.shape[0] - lag, 0)
    alone: list[tuple[Tensor, Tensor | None, Tensor | None]]
    if weights is None:
        common, largest = scatter(x[lag:count], None, exact)
        alone = [(x[: min(lag, count)], None, None), (x[max(lag, count) :], None, None)]
    else:
        roles = [torch.nn.functional.pad(weights, ends) for ends in ((0, rows - count), (rows - count, 0))]
        shared = torch.minimum(*roles)
        common, largest = scatter(x, shared, exact)
        places = [(role > shared).nonzero()[:, 0] for role in roles]
        alone = [(x, (role - shared)[place], place) for role, place in zip(roles, places, strict=True)]
    scatters = []
    for own, weight, numbers in alone:
        rest, other = scatter(own, weight, exact, numbers)
        scatters.append(common.merged(rest))
        largest = max(largest, other)
    first, second = scatters
    return first, second, cross(x[:count], x[rows - count :], first, second, weights, exact), largest


def cross(x: Tensor, y: Tensor, first: Scatter, second: Scatter, weights: Tensor | None, exact: bool) -> Tensor:
    """Σ w (x − x̄)(y − ȳ)ᵀ, (D, E) fp64."""
    dtype = computed_dtype(x, exact)
    left, right = Rows(x, first.shift(dtype), first.mean), Rows(y, second.shift(dtype), second.mean)
    return add_up(left, right, first.weight, None, weights, exact)[0]


def covariance(x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, precision: str) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.moments`. ``x`` (H, N, D), ``y`` (H, N, E) or None, ``weights`` (H, max(N − lag, 0))."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = y if y is None or y.stride(-1) == 1 else y.contiguous()
    heads = [
        moments_of_finite(
            x[head], None if y is None else y[head], None if weights is None else weights[head], lag, precision
        )
        for head in range(x.shape[0])
    ]
    return heads[0] if len(heads) == 1 else tuple(torch.cat(parts) for parts in zip(*heads, strict=True))


def moments_of_finite(
    x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, precision: str
) -> tuple[Tensor, ...]:
    """The outputs for one head, each with its axis; what the fast path must not decide is done again."""
    exponent = 0
    if weights is not None:
        weights = weights.where((weights > 0) & (weights < torch.inf), 0.0)
        exponent = math.frexp(float(weights.max()))[1] if weights.numel() else 0
        weights = torch.ldexp(weights, torch.tensor(-exponent))  # at most 1: no product overflows by a weight
    pairs_in = max(x.shape[0] - lag, 0) if weights is None else int(weights.count_nonzero())
    exact = precision == "exact" or pairs_in < FEW
    first, second, xy, largest = moments(x, y, weights, lag, exact)
    if not largest < math.inf:
        left, right = pairs(x[None], None if y is None else y[None], lag)
        weights = effective_weights(left, right, None if weights is None else weights[None])[0][0]
        first, second, xy, largest = moments(x, y, weights, lag, exact)
    if not exact and x.dtype != torch.float64 and largest > 0 and not SMALLEST < largest < LARGEST:
        first, second, xy, _ = moments(x, y, weights, lag, True)
    outputs = [x.new_tensor(first.weight, dtype=torch.float64), first.mean, second.mean]
    outputs += [first.scatter, xy, second.scatter]
    if exponent:
        outputs = [out if i in (1, 2) else out * 2.0**exponent for i, out in enumerate(outputs)]
    return tuple(out[None] for out in outputs)
