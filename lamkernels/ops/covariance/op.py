"""Registration of ``lamkernels::covariance`` and its gradient.

With a = x − x̄ and b = y − ȳ the scatters have no derivative through the means, because Σ w a = 0: a cotangent G of
Σ w a bᵀ sends w·G b to x and w·Gᵀ a to y, aᵀG b to w, and one of x̄ sends w/W·g to x and a·g/W to w.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lamkernels.ops.covariance.reference import pairs
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
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
        return _gradients(ctx, *grads)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Plain matrix products, in fp32 (fp64 for fp64 rows and exact ones): they are differentiable again."""
    x, y, weights, total, mean_x, mean_y = ctx.saved_tensors
    exact = x.dtype == torch.float64 or ctx.precision == "exact"
    computed = torch.float64 if exact else torch.float32
    first, second = pairs(x, y, ctx.lag)
    inside = _finite(first.detach()) & _finite(second.detach())
    if weights is not None:
        inside &= (weights > 0) & (weights < torch.inf)
    share = total.where(total > 0, 1.0).reciprocal()[:, None, None]
    shift_x, shift_y = (None if g is None else (g[:, None] * share).to(computed) for g in grads[1:3])  # (H, 1, D)
    xx, xy, yy = (None if g is None else g.to(computed) for g in grads[3:])
    both = second.shape[-1] > 0
    a = _centred(first, mean_x, inside, computed)
    b = _centred(second, mean_y, inside, computed) if both else a[..., :0]
    # the derivatives of the sums for pairs of weight 1
    to_first = _sum(_product(a, _symmetric(xx)), _product(b, _transposed(xy)) if both else None)
    to_second = _sum(_product(b, _symmetric(yy)), _product(a, xy)) if both else None
    grad_x, grad_y = (_weighed(*terms, weights, inside) for terms in ((to_first, shift_x), (to_second, shift_y)))
    if ctx.lag and both:  # the second rows are those of x too
        rest, pad = min(ctx.lag, x.shape[1]), torch.nn.functional.pad
        ends = (grad_x, (0, 0, 0, rest)), (grad_y, (0, 0, rest, 0))
        grad_x, grad_y = _sum(*(None if grad is None else pad(grad, end) for grad, end in ends)), None
    grad_weights: Tensor | None = None
    if weights is not None and ctx.needs_input_grad[2]:
        of_first = _sum(_product(a, xx), shift_x)
        of_second = _sum(_product(b, yy), _product(a, xy), shift_y) if both else None
        parts = [(rows * of).sum(-1) for rows, of in ((a, of_first), (b, of_second)) if of is not None]
        of_weight = _sum(*parts, None if grads[0] is None else grads[0][:, None])
        grad_weights = None if of_weight is None else (of_weight * inside).to(weights.dtype)
    grad_x, grad_y = (None if grad is None else grad.to(x.dtype) for grad in (grad_x, grad_y))
    return grad_x, grad_y, grad_weights, None, None, None


def _finite(rows: Tensor) -> Tensor:
    """Which rows (H, N, D) have finite entries only, (H, N)."""
    if rows.shape[-1] == 0:
        return rows.new_ones(rows.shape[:2], dtype=torch.bool)
    largest: Tensor = torch.linalg.vector_norm(rows, torch.inf, -1)  # in one pass, unlike isfinite().all()
    return largest < torch.inf


def _centred(rows: Tensor, mean: Tensor, inside: Tensor, computed: torch.dtype) -> Tensor:
    """rows − mean in the computed dtype, 0 outside; in two steps, so that a large mean costs no accuracy."""
    near = mean.detach().to(computed)[:, None]
    centred = rows.to(computed) - near
    centred -= (mean[:, None] - near.double()).to(computed)
    return centred.masked_fill_(~inside[..., None], 0.0)


def _weighed(terms: Tensor | None, shift: Tensor | None, weights: Tensor | None, inside: Tensor) -> Tensor | None:
    """w · (terms + shift), 0 outside, where ``terms`` is 0 already."""
    total = _sum(terms, shift)
    if total is None or (weights is None and shift is None):
        return total
    scale = inside if weights is None else weights.where(inside, 0.0)
    return total * scale.to(total.dtype)[..., None]


def _product(rows: Tensor, matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else rows @ matrix


def _transposed(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.transpose(1, 2)


def _symmetric(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix + matrix.transpose(1, 2)


def _sum(*terms: Tensor | None) -> Tensor | None:
    """Of the terms that are not None."""
    given = [term for term in terms if term is not None]
    return functools.reduce(torch.add, given) if given else None


register_gradient("covariance", _backward, _setup_context)
