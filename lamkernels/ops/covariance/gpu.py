"""What the GPU backends share: moments from sums of products of shifted rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lamkernels.ops.covariance.reference import pairs

SAMPLE = 1024  # rows that the provisional mean is computed from


class Factor(NamedTuple):
    """Rows (H, P, D), their provisional shift (H, D) in the computed dtype, and their mean (H, D) fp64 once known."""

    x: Tensor
    shift: Tensor
    mean: Tensor


# The weight (H, P) fp64 of pairs of rows (H, P, D) and (H, P, E), from those given, (H, P) fp64 or None.
PairWeights = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# Of factors, weights (H, P), and whether the factors are the same: Σ w (x − shift)(y − shift)ᵀ (H, D, E), of the same
# factors the upper triangle, and Σ w (x − shift) (H, D), both fp64.
PartialProducts = Callable[[Factor, Factor, Tensor, bool], tuple[Tensor, Tensor]]


def moments(
    x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, computed: torch.dtype, pair_weights: PairWeights,
    partial_products: PartialProducts,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See :func:`lamkernels.moments`. ``x`` (H, N, D), ``y`` (H, N, E) or None, ``weights`` (H, max(N − lag, 0))."""
    first, second = pairs(x, y, lag)
    inside = pair_weights(first, second, weights)
    total = inside.sum(1)
    left, xx = _scatter(first, inside, total, computed, partial_products)
    if second.shape[2] == 0:
        heads = len(first)
        return total, left.mean, total.new_zeros((heads, 0)), xx, xx[..., :0].clone(), xx[..., :0, :0].clone()
    right, yy = _scatter(second, inside, total, computed, partial_products)
    xy = partial_products(left, right, inside, False)[0]
    xy -= (total[:, None] * (left.mean - left.shift))[:, :, None] * (right.mean - right.shift)[:, None, :]
    return total, left.mean, right.mean, xx, xy, yy


def _provisional_shift(x: Tensor, weights: Tensor, computed: torch.dtype) -> Tensor:
    """The mean of evenly spaced rows of positive weight (H, D), to 1/16 of the spread of a column.

    So integers and pixels keep their grid, and their products stay exact.
    """
    step = max(1, x.shape[1] // SAMPLE)
    inside = weights[:, ::step, None] > 0
    sample, count = x[:, ::step].double(), inside.sum(1).clamp(min=1)
    mean = torch.where(inside, sample, 0.0).sum(1) / count
    spread = (torch.where(inside, sample - mean[:, None], 0.0).square().sum(1) / count).sqrt()
    grid = torch.exp2(spread.where(spread > 0, 1.0).log2().ceil()) / 16
    return torch.where(spread > 0, (mean / grid).round() * grid, mean).to(computed)


def _scatter(
    x: Tensor, weights: Tensor, total: Tensor, computed: torch.dtype, partial_products: PartialProducts
) -> tuple[Factor, Tensor]:
    """The rows with their mean, and their centred scatter (H, D, D) fp64."""
    shift = _provisional_shift(x, weights, computed)
    rows = Factor(x, shift, shift.double())
    products, sums = partial_products(rows, rows, weights, True)
    step = sums / total.where(total > 0, 1.0)[:, None]
    root = step * total.sqrt()[:, None]
    upper = (products - root[:, :, None] * root[:, None, :]).triu()
    return rows._replace(mean=rows.mean + step), upper + upper.triu(1).transpose(1, 2)
