"""covariance on the CPU: scatters and cross scatters over :mod:`products`, and what its fast path must not decide."""

# mypy: allow-untyped-defs, no-check-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined,call-arg"
from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.covariance import numba_few
from lamkernels.ops.covariance.numba_few import FEW
from lamkernels.ops.covariance.products import (
    DEPTH,
    SHARED,
    Job,
    Rows,
    Shift,
    Sums,
    chunks_of,
    computed_dtype,
    runs_of,
)
from lamkernels.ops.covariance.reference import effective_weights, pairs
from lamkernels.ops.nearest_code.numba import FLAGS, elements
from lamkernels.ops.parallel import compiled, launch
from lamkernels.ops.simd import stored_type, widen, words

SAMPLE = 1 << 16  # entries that the provisional mean is computed from
FEW_ENDS = 16  # rows that are added to a scatter as one outer product each
# |x − shift| between these does not overflow or vanish in fp32: 64 times 2⁵⁸ squared
# a unit of dither, as a share of the spread: all of them hardly enlarge a product, one changes its rounding
DITHER = 181 * 2.0**-23
LARGEST, SMALLEST = 2.0**58, 2.0**-50


class Scatter(NamedTuple):
    """Weight, mean (D,) fp64 and centred scatter (D, D) fp64 of rows, and the shift that they were multiplied about."""

    weight: float
    mean: Tensor
    scatter: Tensor
    about: Shift

    def shift(self, dtype: torch.dtype) -> Shift:
        """What to subtract from the rows before other products in ``dtype``."""
        if not self.far():
            return self.about
        return on_grid(self.mean, self.scatter.diagonal() / (self.weight or 1.0), dtype)

    def far(self) -> bool:
        """Whether the mean is so far from the shift that products should rather be made about the mean."""
        step = self.weight * float((self.mean - self.about.near).square().sum())
        return step > float(self.scatter.trace()) / math.sqrt(len(self.mean))

    def merged(self, other: Scatter) -> Scatter:
        """Of the rows of both (Chan, Golub and LeVeque 1983)."""
        weight = self.weight + other.weight
        share = other.weight / (weight or 1.0)
        step = other.mean - self.mean
        between = math.sqrt(self.weight * share) * step
        scatter = torch.outer(between, between).add_(self.scatter).add_(other.scatter)  # symmetric, unlike addr
        return Scatter(weight, self.mean + share * step, scatter, self.about)


def scatter(x: Tensor, weights: Tensor | None, exact: bool, numbers: Tensor | None = None) -> tuple[Scatter, float]:
    """The scatter of the rows of positive weight, and their largest entry about the shift."""
    shift = provisional_shift(x, weights, numbers, exact)
    table = chunks_of(x.shape[0] if numbers is None else numbers.shape[0])
    for _ in range(2):
        job = Job(Rows(x, shift), None, table, numbers, weights, exact, triangle=True, full=False)
        result = scatter_of(job.results([1], True), shift)
        if not result.far():
            break
        shift = result.shift(computed_dtype(x, exact))
    return result, job.largest


def scatter_of(sums: Sums, shift: Shift) -> Scatter:
    """With the mean in place of what is left of it."""
    return Scatter(sums.weight, shift.near + sums.step / (sums.weight or 1.0), sums.products, shift)


def provisional_shift(x: Tensor, weights: Tensor | None, numbers: Tensor | None, exact: bool) -> Shift:
    """:func:`on_grid` of the mean of evenly spaced rows of positive weight."""
    if weights is not None and numbers is None:
        numbers = weights.nonzero()[:, 0]
    count, dim = x.shape[0] if numbers is None else numbers.shape[0], x.shape[1]
    step = max(1, count // max(256, SAMPLE // dim))
    mean, variance = (torch.zeros(dim, dtype=torch.float64) for _ in range(2))
    if count == 0:
        return Shift(mean, variance)
    sampling = [x.data_ptr(), x.stride(0), dim, 0 if numbers is None else numbers.data_ptr(), count, step]
    launch(compiled(_sample, x.dtype), [*sampling, mean.data_ptr(), variance.data_ptr()], 1, 0)
    dtype = computed_dtype(x, exact)
    shift = on_grid(mean, variance, dtype)
    if dtype == torch.float64:
        return shift
    # integers, pixels and halves near their grid: their sums are exact, but for a dither
    scale, even = 2.0**7 * DITHER / shift.unit, torch.ones(dim, dtype=torch.bool)
    sampling[5] = max(1, count // 256)
    launch(compiled(_on_grid, x.dtype), [*sampling, scale.data_ptr(), even.data_ptr()], 1, 0)
    return shift._replace(unit=shift.unit.where(~even, 0.0))


@njit(**FLAGS)
def _sampled(a, n, stored):
    """Row ``n`` of a sample. Parameters: 2 rows, 3 their stride, 4 D, 5 row numbers or 0, 6 how many, 7 step."""
    row = n if a[5] == 0 else elements(a[5], n, 1, np.int64(0))[0]
    return elements(a[2], row * a[3], a[4], stored)


@njit(**FLAGS)
def _sample_moments(p, stored):
    """Mean (D,) and variance (D,) of every step-th row to 8 and 9, fp64."""
    a = carray(p, (10,))
    mean, variance = elements(a[8], 0, a[4], np.float64(0)), elements(a[9], 0, a[4], np.float64(0))
    count = 0
    for n in range(0, a[6], a[7]):
        row = _sampled(a, n, stored)
        count += 1
        for d in range(a[4]):
            mean[d] += widen(row[d])
    mean /= count
    for n in range(0, a[6], a[7]):
        row = _sampled(a, n, stored)
        for d in range(a[4]):
            variance[d] += (widen(row[d]) - mean[d]) ** 2
    variance /= count


@njit(**FLAGS)
def _find_grid(p, stored):
    """Whether every step-th row times the scales (D,) fp64 at 8 has whole numbers, to (D,) bool at 9."""
    a = carray(p, (10,))
    scale, even = elements(a[8], 0, a[4], np.float64(0)), elements(a[9], 0, a[4], np.bool_(0))
    for n in range(0, a[6], a[7]):
        row = _sampled(a, n, stored)
        for d in range(a[4]):
            value = widen(row[d]) * scale[d]
            even[d] &= value == np.rint(value)


def _sample(p):
    _sample_moments(words(p), stored_type(p))


def _on_grid(p):
    _find_grid(words(p), stored_type(p))


def on_grid(mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Shift:
    """The mean to within 1/16 of the spread, with values of ``dtype``, and a unit of dither for fp32.

    Rounded to a multiple of 2^(⌈log2 rms⌉ − 4): rows of integers or halves stay on their grid, and their products are
    exact in fp32. Off it, equal entries give equal products, whose roundings do not average out.
    """
    spread = torch.exp2(variance.sqrt().log2().ceil())
    usable = (spread > 0) & (spread < torch.inf)
    near = torch.where(usable, (mean / (spread / 16)).round() * (spread / 16), mean).to(dtype).double()
    return Shift(near, (spread * DITHER).where(usable & (spread > 2.0**-100) & (dtype == torch.float32), 0.0))


def moments(
    x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, exact: bool
) -> tuple[Scatter, Scatter, Tensor, float]:
    """Scatters of the first and of the second rows, their cross scatter, and the largest entry about a shift."""
    if not lag:
        first, largest = scatter(x, weights, exact)
        if y is None:
            mean, square, xy = (torch.empty(shape, dtype=torch.float64) for shape in ((0,), (0, 0), (x.shape[1], 0)))
            return first, Scatter(first.weight, mean, square, first.about), xy, largest
        second, other = scatter(y, weights, exact)
        return first, second, cross(x, y, first, second, weights, exact), max(largest, other)
    runs = runs_of_pairs(x, weights, lag)
    if runs is not None:
        return by_runs(x, *runs, lag, exact)
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


def runs_of_pairs(x: Tensor, weights: Tensor | None, lag: int) -> tuple[Any, Any] | None:
    """Starts and stops of the runs of pairs of weight 1; None where there are other weights or runs are short."""
    count = max(x.shape[0] - lag, 0)
    if lag > SHARED or count == 0:
        return None
    if weights is None:
        return np.array([0]), np.array([count])
    inside = weights.numpy() > 0
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    starts, stops = edges[::2], edges[1::2]
    if (
        not len(starts)
        or inside.sum() < max(DEPTH // 2, 2 * lag) * len(starts)
        or not (weights.numpy()[inside] == 1).all()
    ):
        return None
    return starts, stops


def by_runs(x: Tensor, starts: Any, stops: Any, lag: int, exact: bool) -> tuple[Scatter, Scatter, Tensor, float]:
    """:func:`moments` of the pairs of some runs, each row packed once for all products.

    A row that begins one pair of a run and ends another counts once for both scatters; the first and the last of a run
    are added to one of them: no cancellation.
    """
    table, numbers = runs_of(starts, stops, lag), None
    if len(starts) > 1 or stops[0] + lag < len(x):
        numbers = torch.from_numpy(np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)]))
    shift = provisional_shift(x, None, numbers, exact)
    ends = [
        torch.from_numpy(np.concatenate([np.arange(a, b) for a, b in zip(begin, end, strict=True)]))
        for begin, end in (
            (starts, np.minimum(starts + lag, stops)),
            (np.maximum(starts + lag, stops), stops + lag),
        )
    ]
    for _ in range(2):
        job = Job(Rows(x, shift), None, table, None, None, exact, triangle=True, full=True, lag=lag)
        scatters = [scatter_with(job, shift, x, alone, exact) for alone in ends]
        if not scatters[0].far():
            break
        shift = scatters[0].shift(computed_dtype(x, exact))
    xy = job.results([0, 1, 2], False, 0, [2, 3]).products
    return scatters[0], scatters[1], xy, job.largest


def scatter_with(job: Job, shift: Shift, x: Tensor, alone: Tensor, exact: bool) -> Scatter:
    """Of the rows that a job counts for both scatters and, each of weight 1, the rows numbered ``alone``."""
    if len(alone) <= FEW_ENDS:
        return scatter_of(job.results([1, 2], True, others=x[alone].double() - shift.near), shift)
    return scatter_of(job.results([1, 2], True), shift).merged(scatter(x, None, exact, alone)[0])


def cross(x: Tensor, y: Tensor, first: Scatter, second: Scatter, weights: Tensor | None, exact: bool) -> Tensor:
    """Σ w (x − x̄)(y − ȳ)ᵀ, (D, E) fp64."""
    left, right = (Rows(rows, side.shift(computed_dtype(x, exact))) for rows, side in ((x, first), (y, second)))
    job = Job(left, right, chunks_of(x.shape[0]), None, weights, exact, triangle=False, full=True)
    return job.results([1], False, 1, [1]).products


def covariance(x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, precision: str) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.moments`. ``x`` (H, N, D), ``y`` (H, N, E) or None, ``weights`` (H, max(N − lag, 0))."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if y is None and weights is None and not lag and numba_few.suits(x):
        weight, mean, xx = numba_few.moments(x)
        mean_y, xy, yy = (xx.new_empty((x.shape[0], *shape)) for shape in ((0,), (x.shape[2], 0), (0, 0)))
        return weight, mean, mean_y, xx, xy, yy
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
        exponent = math.frexp(float(weights.max()))[1] - 1 if weights.numel() and weights.any() else 0
        weights = torch.ldexp(weights, torch.tensor(-exponent))  # below 2: no product overflows by a weight
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
