"""finite_scalar_quantize and its backward in Triton: one pass each, comparisons instead of a tanh to quantise.

Levels are at least 2 and their product is below 2⁶³, so a row has at most 62 entries: one tile holds it.
"""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.finite_scalar_quantize.levels import tables
from lamkernels.ops.triton_common import (
    dense_rows,
    finite_rows,
    head_stride,
    load_rows,
    on_device,
    store_rows,
    unit_inner,
)

COUNTED = tl.constexpr(8)  # levels up to which every threshold is compared, and nothing gathered


@triton.jit
def finite_scalar_quantize_fwd_kernel(
    x: tensor, thresholds: tensor, codes: tensor, strides: tensor, quantized: tensor, indices: tensor,
    num_rows: tensor, x_h: tensor, x_n: tensor, q_h: tensor, tiles: tensor,
    LEVELS: tl.constexpr, STEPS: tl.constexpr, DENSE: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
) -> None:  # fmt: skip
    """thresholds (2^STEPS − 1, D), increasing, from LEVELS − 1 on +inf; codes (2^STEPS, D)."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BN
    left = tl.minimum(num_rows - first, BN).to(tl.int32)
    d = tl.arange(0, BD)
    entry = load_rows(x + head * x_h + first * x_n, left, x_n, 1, DENSE, DIM, BN, BD)  # [BN, BD]
    entry = entry.to(thresholds.dtype.element_ty)
    finite = finite_rows(entry, BD)  # [BN]
    position = tl.zeros([BN, BD], tl.int32)
    if LEVELS <= COUNTED:
        code = tl.broadcast_to(tl.load(codes + d, mask=d < DIM, other=0.0)[None, :], [BN, BD])
        for i in tl.static_range(1, LEVELS):
            reached = entry >= tl.load(thresholds + (i - 1) * DIM + d, mask=d < DIM, other=0.0)[None, :]
            code = tl.where(reached, tl.load(codes + i * DIM + d, mask=d < DIM, other=0.0)[None, :], code)
            position += reached.to(tl.int32)
    else:
        inside = (d < DIM)[None, :]
        for i in tl.static_range(STEPS):
            step = 1 << (STEPS - 1 - i)
            edge = thresholds + (position + (step - 1)) * DIM + d[None, :]
            position += tl.where(entry >= tl.load(edge, mask=inside, other=0.0), step, 0)
        code = tl.load(codes + position * DIM + d[None, :], mask=inside, other=0.0)
    store_rows(quantized + head * q_h + first * DIM, left, tl.where(finite[:, None], code, float("nan")), DIM, BN, BD)
    stride = tl.load(strides + d, mask=d < DIM, other=0)
    index = tl.sum(position.to(tl.int64) * stride[None, :], axis=1)
    row = first + tl.arange(0, BN)
    tl.store(indices + head * num_rows + row, tl.where(finite, index, -1), mask=row < num_rows)


@triton.jit
def finite_scalar_quantize_bwd_kernel(
    x: tensor, indices: tensor, grad_quantized: tensor, slopes: tensor, grad_x: tensor, num_rows: tensor,
    x_h: tensor, x_n: tensor, g_h: tensor, g_n: tensor, g_d: tensor, out_h: tensor, tiles: tensor,
    DENSE: tl.constexpr, G_DENSE: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """slopes (2, D): the slopes and the shifts of the columns."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BN
    left = tl.minimum(num_rows - first, BN).to(tl.int32)
    row, d = first + tl.arange(0, BN), tl.arange(0, BD)
    used = tl.load(indices + head * num_rows + row, mask=row < num_rows, other=-1) >= 0  # [BN]
    wide = slopes.dtype.element_ty
    entry = load_rows(x + head * x_h + first * x_n, left, x_n, 1, DENSE, DIM, BN, BD).to(wide)  # [BN, BD]
    grad = load_rows(grad_quantized + head * g_h + first * g_n, left, g_n, g_d, G_DENSE, DIM, BN, BD).to(wide)
    slope = tl.load(slopes + d, mask=d < DIM, other=0.0)[None, :]
    shift = tl.load(slopes + DIM + d, mask=d < DIM, other=0.0)[None, :]
    e = tl.exp(-2.0 * tl.abs(entry + shift))  # 1 − tanh² = 4e / (1 + e)², which does not cancel
    grad = tl.where(used[:, None], grad * slope * (4.0 * e / ((1.0 + e) * (1.0 + e))), 0.0)
    store_rows(grad_x + head * out_h + first * DIM, left, grad.to(grad_x.dtype.element_ty), DIM, BN, BD)


def finite_scalar_quantize(x: Tensor, levels: list[int], rounding: int) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.finite_scalar_quantize`. ``x`` (H, N, D)."""
    x, (heads, rows, dim) = unit_inner(x), x.shape
    thresholds, codes, _, strides = _columns(tuple(levels), rounding, x.dtype, x.device)
    quantized, indices = x.new_empty(x.shape), x.new_empty((heads, rows), dtype=torch.int64)
    tile = tuning.scalars(tuning.target_of(x.device), dim)
    tiles = tuning.ceil_div(rows, tile.rows)
    if heads * tiles:
        with on_device(x):
            finite_scalar_quantize_fwd_kernel[(heads * tiles,)](
                x, thresholds, codes, strides, quantized, indices, rows, head_stride(x), x.stride(1),
                head_stride(quantized), tiles, max(levels), thresholds.shape[0].bit_length(), dense_rows(x), dim,
                tile.rows, tile.dim, **tile.options(),
            )  # fmt: skip
    return quantized, indices


def finite_scalar_quantize_backward(
    x: Tensor, indices: Tensor, grad_quantized: Tensor, levels: list[int], rounding: int
) -> Tensor:
    """grad_x (H, N, D) in the dtype of x; see the reference for the formula."""
    x, (heads, rows, dim) = unit_inner(x), x.shape
    _, _, slopes, _ = _columns(tuple(levels), rounding, x.dtype, x.device)
    grad_x, tile = x.new_empty(x.shape), tuning.scalars(tuning.target_of(x.device), dim)
    tiles = tuning.ceil_div(rows, tile.rows)
    if heads * tiles:
        with on_device(x):
            finite_scalar_quantize_bwd_kernel[(heads * tiles,)](
                x, indices.contiguous(), grad_quantized, slopes, grad_x, rows, head_stride(x), x.stride(1),
                head_stride(grad_quantized), *grad_quantized.stride()[1:], head_stride(grad_x), tiles, dense_rows(x),
                dense_rows(grad_quantized), dim, tile.rows, tile.dim, **tile.options(),
            )  # fmt: skip
    return grad_x


@functools.cache
def _columns(levels: tuple[int, ...], rounding: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The tables of the levels, thresholds and codes transposed: a thread reads those of its columns side by side."""
    thresholds, codes, slopes, strides = tables(levels, rounding, dtype, device)
    return thresholds.t().contiguous(), codes.t().contiguous(), slopes, strides
