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
from lamkernels.eager import is_ordinary
from lamkernels.ops.constants import COSINE_EPS
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
    x: tensor, out: tensor, lengths: tensor, num_rows: tensor, dim: tensor, BN: tl.constexpr, BD: tl.constexpr
) -> None:  # fmt: skip
    """out (R, D) = x / max(‖x‖, ε), NaN for a row that is not finite, and the divisors (R,) fp64."""
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
    tl.store(lengths + n, length, mask=inside)
    for start in range(0, dim, BD):
        unit = entries_of(rows, inside, start, dim, BD) / length[:, None]
        store_entries(out + n * dim, inside, start, dim, tl.where(finite[:, None], unit, float("nan")), BD)


@triton.jit
def unit_rows_bwd_kernel(
    unit: tensor, lengths: tensor, grad: tensor, out: tensor, num_rows: tensor, dim: tensor, BN: tl.constexpr,
    BD: tl.constexpr,
) -> None:  # fmt: skip
    """out (R, D) = (g − u (u·g)) / ‖x‖; g / ε where the norm is clamped, 0 where u is NaN."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = n < num_rows
    units, grads = unit + n * dim, grad + n * dim
    along = tl.zeros([BN], tl.float64)
    for start in range(0, dim, BD):
        u = entries_of(units, inside, start, dim, BD)
        along += tl.sum(u * entries_of(grads, inside, start, dim, BD), axis=1)
    length = tl.load(lengths + n, mask=inside, other=1.0)
    along = tl.where(length > COSINE_CLAMP, along, 0.0)
    for start in range(0, dim, BD):
        u = entries_of(units, inside, start, dim, BD)
        value = (entries_of(grads, inside, start, dim, BD) - u * along[:, None]) / length[:, None]
        store_entries(out + n * dim, inside, start, dim, tl.where(u == u, value, 0.0), BD)


class _UnitOrNan(torch.autograd.Function):
    """What it saves is its own, so that the rows may be overwritten before the backward: dead codes are."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dtype: torch.dtype) -> Tensor:
        unit, lengths = normalised(rows, dtype)
        ctx.save_for_backward(unit, lengths)
        ctx.dtype = rows.dtype
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        unit, lengths = ctx.saved_tensors
        as_saved = unit.is_contiguous() and lengths.is_contiguous()
        if not as_saved or not is_ordinary(grad, device=unit.device.type):
            return _gradient(unit.detach(), lengths, grad).to(ctx.dtype), None
        out = unit.new_empty(unit.shape, dtype=ctx.dtype)
        _launch(unit_rows_bwd_kernel, unit, lengths, grad.contiguous(), out)
        return out, None


def _gradient(unit: Tensor, lengths: Tensor, grad: Tensor) -> Tensor:
    """The same by operators of torch, for gradients that a kernel cannot read."""
    u, g = unit.double(), grad.double()
    along = torch.where(lengths > COSINE_EPS, (u * g).sum(-1), 0.0)
    return torch.where(u.isnan(), 0.0, (g - u * along[..., None]) / lengths[..., None])


def unit_or_nan(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`lamkernels.ops.cosine.unit_or_nan` of contiguous rows (..., D) in one launch; its gradient is another."""
    unit: Tensor = _UnitOrNan.apply(rows, dtype)  # type: ignore[no-untyped-call]
    return unit


def normalised(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same without a gradient, and what the rows were divided by, (...,) fp64."""
    unit = rows.new_empty(rows.shape, dtype=dtype)
    lengths = rows.new_empty(rows.shape[:-1], dtype=torch.float64)
    _launch(unit_rows_kernel, rows, unit, lengths)
    return unit, lengths


def _launch(kernel: Any, rows: Tensor, *others: Tensor) -> None:
    dim = rows.shape[-1]
    count, tile = rows.numel() // dim, tuning.by_row(tuning.target_of(rows.device), dim)
    if count:
        with on_device(rows):
            kernel[(tuning.ceil_div(count, tile.rows),)](
                rows, *others, count, dim, tile.rows, tile.dim, **tile.options()
            )  # fmt: skip
