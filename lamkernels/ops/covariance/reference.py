"""The specification of covariance: two passes in fp64 over all rows."""

from __future__ import annotations

import torch
from torch import Tensor


def covariance(x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, precision: str) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.moments`. ``x`` (H, N, D), ``y`` (H, N, E) or None, ``weights`` (H, max(N − lag, 0))."""
    first, second = pairs(x, y, lag)
    weight, inside = effective_weights(first, second, weights)
    total = weight.sum(-1)
    w = weight[..., None]  # (H, N, 1)
    left, right = (rows.double().masked_fill(~inside[..., None], 0.0) for rows in (first, second))
    mean_x, mean_y = ((w * rows).sum(1) / total.where(total > 0, 1.0)[:, None] for rows in (left, right))
    left, right = ((rows - mean[:, None]) for rows, mean in ((left, mean_x), (right, mean_y)))
    xx, xy, yy = ((w * a).transpose(1, 2) @ b for a, b in ((left, left), (left, right), (right, right)))
    return total, mean_x, mean_y, (xx + xx.transpose(1, 2)) / 2, xy, (yy + yy.transpose(1, 2)) / 2


def pairs(x: Tensor, y: Tensor | None, lag: int) -> tuple[Tensor, Tensor]:
    """The rows that form pairs, (H, P, D) and (H, P, E), as views; E is 0 without y and lag."""
    if lag:
        return x[:, : max(x.shape[1] - lag, 0)], x[:, min(lag, x.shape[1]) :]
    return x, x[..., :0] if y is None else y


def effective_weights(first: Tensor, second: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The fp64 weight of each pair (H, P), 0 for one that is out, and which are in: weight > 0 and both rows finite."""
    weight = first.new_ones(first.shape[:2], dtype=torch.float64) if weights is None else weights.double()
    inside = (weight > 0) & (weight < torch.inf) & first.isfinite().all(-1) & second.isfinite().all(-1)
    return weight.where(inside, 0.0), inside
