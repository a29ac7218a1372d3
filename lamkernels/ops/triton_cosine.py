"""Normalised rows in Triton: what ops/cosine.py writes as some 14 operators of torch, and 20 more for the gradient.

Each of those is a launch, which costs more than its arithmetic at the size of a codebook. Not yet measured on a GPU.
"""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.cosine import unit_or_nan
from lamkernels.ops.triton_common import COSINE_CLAMP, finite_rows, on_device

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@triton.jit
def entries_of(rows: tensor, inside: tensor, start: tensor, dim: tensor, BD: tl.constexpr) -> tensor:
    """The next BD entries of each row as fp64 [BN, BD]; ``rows`` [BN] points to their first ones."""
    d = start + tl.arange(0, BD)
    mask = inside[:, None] & (d < dim)[None, :]
    entry = tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0)
    if entry.dtype != tl.float64:
        entry = entry.to(tl.float32)
    return entry.to(tl.float64)


@triton.jit
def store_entries(
    rows: tensor, inside: tensor, start: tensor, dim: tensor, value: tensor, BD: tl.constexpr
) -> None:  # fmt: skip
    """Stores what :func:`entries_of` loads; as torch does, an fp64 value becomes a half by way of fp32."""
    d = start + tl.arange(0, BD)
    if rows.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(rows[:, None] + d[None, :], value.to(rows.dtype.element_ty), mask=inside[:, None] & (d < dim)[None, :])


@triton.jit
def unit_rows_kernel(
    x: tensor, out: tensor, num_rows: tensor, dim: tensor, BN: tl.constexpr, BD: tl.constexpr
) -> None:  # fmt: skip
    """out (R, D) = x / max(‖x‖, ε), NaN for a row that is not finite; the norm is taken in fp64."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = n < num_rows
    rows = x + n * dim
    square = tl.zeros([BN], tl.float64)
    finite = inside
    for start in range(0, dim, BD):
        entry = entries_of(rows, inside, start, dim, BD)
        square += tl.sum(entry * entry, axis=1)
        finite = finite & finite_rows(entry, BD)
    length = tl.maximum(tl.sqrt(square), COSINE_CLAMP)
    for start in range(0, dim, BD):
        unit = entries_of(rows, inside, start, dim, BD) / length[:, None]
        unit = tl.where(finite[:, None], unit, float("nan"))
        store_entries(out + n * dim, inside, start, dim, unit, BD)


@triton.jit
def unit_rows_bwd_kernel(
    x: tensor, grad: tensor, out: tensor, num_rows: tensor, dim: tensor, BN: tl.constexpr, BD: tl.constexpr
) -> None:  # fmt: skip
    """out (R, D) = (g − u (u·g)) / ‖x‖, u = x / ‖x‖; g / ε where the norm is clamped, 0 where a row is not finite."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = n < num_rows
    rows, grads = x + n * dim, grad + n * dim
    square = tl.zeros([BN], tl.float64)
    along = tl.zeros([BN], tl.float64)
    finite = inside
    for start in range(0, dim, BD):
        entry = entries_of(rows, inside, start, dim, BD)
        square += tl.sum(entry * entry, axis=1)
        along += tl.sum(entry * entries_of(grads, inside, start, dim, BD), axis=1)
        finite = finite & finite_rows(entry, BD)
    norm = tl.sqrt(square)
    length = tl.maximum(norm, COSINE_CLAMP)
    pull = tl.where(norm > COSINE_CLAMP, along / length / length, 0.0)
    for start in range(0, dim, BD):
        value = entries_of(grads, inside, start, dim, BD) - entries_of(rows, inside, start, dim, BD) * pull[:, None]
        value = tl.where(finite[:, None], value / length[:, None], 0.0)
        store_entries(out + n * dim, inside, start, dim, value, BD)


class UnitRows(torch.autograd.Function):
    """See :func:`unit_rows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.dtype = dtype
        out = rows.new_empty(rows.shape, dtype=dtype)
        _launch(unit_rows_kernel, rows, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is differentiated again
            return torch.autograd.grad(unit_or_nan(rows, ctx.dtype), rows, grad, create_graph=True)[0], None
        out = torch.empty_like(rows)
        _launch(unit_rows_bwd_kernel, rows, grad.contiguous(), out)
        return out, None


def unit_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`lamkernels.ops.cosine.unit_or_nan` of contiguous rows (..., D) in one launch; its gradient is another."""
    unit: Tensor = UnitRows.apply(rows, dtype)  # type: ignore[no-untyped-call]
    return unit


def _launch(kernel: Any, rows: Tensor, *others: Tensor) -> None:
    dim = rows.shape[-1]
    count, tile = rows.numel() // dim, tuning.by_row(tuning.target_of(rows.device), dim)
    if count:
        with on_device(rows):
            kernel[(tuning.ceil_div(count, tile.rows),)](
                rows, *others, count, dim, tile.rows, tile.dim, **tile.options()
            )  # fmt: skip
