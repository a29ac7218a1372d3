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
    first, second = pairs(x, y, ctx.lag)
    weight, inside = effective_weights(first.detach(), second.detach(), weights)
    share = total.where(total > 0, 1.0).reciprocal()[:, None, None]
    grad_total, *others = grads
    shift_x, shift_y = ((g[:, None] * share).to(computed) for g in others[:2])  # (H, 1, D), (H, 1, E)
    xx, xy, yy = (g.to(computed) for g in others[2:])
    scale = weight.to(computed)[..., None]
    weighed = weights is not None and ctx.needs_input_grad[2]
    # the derivatives of the sums for pairs of weight 1
    a = _centred(first, mean_x, computed).masked_fill(~inside[..., None], 0.0)
    to_first, to_weight = a @ (xx + xx.transpose(1, 2)), 0.0
    if weighed:
        to_weight = (a * (a @ xx + shift_x)).sum(-1)
    grad_y: Tensor | None = None
    if second.shape[-1]:
        b = _centred(second, mean_y, computed).masked_fill(~inside[..., None], 0.0)
        to_first = to_first + b @ xy.transpose(1, 2)
        grad_y = scale * (b @ (yy + yy.transpose(1, 2)) + a @ xy + shift_y)
        if weighed:
            to_weight = to_weight + (b * (b @ yy + a @ xy + shift_y)).sum(-1)
    grad_x = scale * (to_first + shift_x)
    if ctx.lag and grad_y is not None:  # the second rows are those of x too
        rest, pad = min(ctx.lag, x.shape[1]), torch.nn.functional.pad
        grad_x, grad_y = pad(grad_x, (0, 0, 0, rest)) + pad(grad_y, (0, 0, rest, 0)), None
    grad_weights = ((to_weight + grad_total[:, None]) * inside).to(weights.dtype) if weighed else None
    return grad_x.to(x.dtype), None if grad_y is None else grad_y.to(x.dtype), grad_weights, None, None, None


def _centred(rows: Tensor, mean: Tensor, computed: torch.dtype) -> Tensor:
    """rows − mean in the computed dtype; in two steps, so that a large mean costs no accuracy."""
    near = mean.detach().to(computed)[:, None]
    return (rows.to(computed) - near) - (mean[:, None] - near.double()).to(computed)


register_gradient("covariance", _backward, _setup_context)
