"""Registration of ``lamkernels::covariance`` and its gradient.

With a = x − x̄ and b = y − ȳ the scatters have no derivative through the means, because Σ w a = 0: a cotangent G of
Σ w a bᵀ sends w·G b to x and w·Gᵀ a to y, aᵀG b to w, and one of x̄ sends w/W·g to x and a·g/W to w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamkernels.ops.covariance.reference import effective_weights, pairs
from lamkernels.ops.registration import register, register_gradient


def _fake(x: Tensor, y: Tensor | None, _weights: Tensor | None, lag: int, _precision: str) -> tuple[Tensor, ...]:
    heads, _, dim = x.shape
    other = dim if lag else 0 if y is None else y.shape[-1]
    shapes = (), (dim,), (other,), (dim, dim), (dim, other), (other, other)
    return tuple(x.new_empty((heads, *shape), dtype=torch.float64) for shape in shapes)


# x (H, N, D), y (H, N, E) in x.dtype or None, weights (H, P) fp64 or None, of the P = max(N − lag, 0) pairs ->
#   weight (H,), mean_x (H, D), mean_y (H, E), xx (H, D, D), xy (H, D, E), yy (H, E, E), all fp64.
# With a lag y is None, the pairs are (x_t, x_{t + lag}) and E = D; without either E = 0.
covariance = register(
    "covariance",
    "covariance",
    "(Tensor x, Tensor? y, Tensor? weights, SymInt lag, str precision, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, weights, ctx.lag, ctx.precision, _ = inputs
    ctx.save_for_backward(x, y, weights, *output[:3])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Plain matrix products, in fp32 (fp64 for fp64 rows and exact ones): they are differentiable again."""
    x, y, weights, total, mean_x, mean_y = ctx.saved_tensors
    exact = x.dtype == torch.float64 or ctx.precision == "exact"
    computed = torch.float64 if exact else torch.float32
    if y is None and weights is None and not ctx.lag:  # the regulariser of every training step
        a = _centred(x, mean_x, computed)
        share = grads[1][:, None] / total.clamp(min=1.0)[:, None, None]
        grad = a @ (grads[3] + grads[3].transpose(1, 2)).to(computed) + share.to(computed)
        return grad.masked_fill(~x.isfinite().all(-1, keepdim=True), 0.0).to(x.dtype), None, None, None, None, None
    first, second = pairs(x, y, ctx.lag)
    weight, inside = effective_weights(first.detach(), second.detach(), weights)
    a, b = (
        _centred(rows, mean, computed).masked_fill(~inside[..., None], 0.0)
        for rows, mean in ((first, mean_x), (second, mean_y))
    )
    share = total.where(total > 0, 1.0).reciprocal()[:, None, None]
    grad_total, *others = grads
    shifts = [(g[:, None] * share).to(computed) for g in others[:2]]  # (H, 1, D), (H, 1, E)
    xx, xy, yy = (g.to(computed) for g in others[2:])
    # the derivatives of the sums for pairs of weight 1
    to_first = a @ (xx + xx.transpose(1, 2)) + b @ xy.transpose(1, 2) + shifts[0]
    to_second = b @ (yy + yy.transpose(1, 2)) + a @ xy + shifts[1]
    scale = weight.to(computed)[..., None]
    grad_x: Tensor | None = (scale * to_first).to(x.dtype)
    grad_y: Tensor | None = (scale * to_second).to(x.dtype) if y is not None else None
    if ctx.lag:
        rest = min(ctx.lag, x.shape[1])
        grad_x = torch.nn.functional.pad(scale * to_first, (0, 0, 0, rest))
        grad_x = (grad_x + torch.nn.functional.pad(scale * to_second, (0, 0, rest, 0))).to(x.dtype)
    grad_weights = None
    if weights is not None and ctx.needs_input_grad[2]:
        both = (a * (a @ xx + shifts[0])).sum(-1) + (b * (b @ yy + a @ xy + shifts[1])).sum(-1)
        grad_weights = ((both + grad_total[:, None]) * inside).to(weights.dtype)
    return grad_x, grad_y, grad_weights, None, None, None


def _centred(rows: Tensor, mean: Tensor, computed: torch.dtype) -> Tensor:
    """rows − mean in the computed dtype; in two steps, so that a large mean costs no accuracy."""
    near = mean.detach().to(computed)[:, None]
    return (rows.to(computed) - near) - (mean[:, None] - near.double()).to(computed)


register_gradient("covariance", _backward, _setup_context)
