"""finite_scalar_quantize and its backward in Triton: one pass each, a binary search instead of a tanh to quantise.

Levels are at least 2 and their product is below 2⁶³, so a row has at most 62 entries: one tile holds it.
"""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.finite_scalar_quantize.levels import tables
from lamkernels.ops.triton_common import is_finite, on_device, unit_inner


@triton.jit
def finite_scalar_quantize_fwd_kernel(
    x: tensor, thresholds: tensor, codes: tensor, strides: tensor, quantized: tensor, indices: tensor,
    num_rows: tensor, dim: tensor, x_h: tensor, x_n: tensor, tiles: tensor,
    STEPS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """thresholds (D, 2^STEPS − 1), increasing, the rest +inf; codes (D, 2^STEPS)."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    inside = (row < num_rows)[:, None] & (d < dim)[None, :]  # [BN, BD]
    entry = tl.load(x + head * x_h + row[:, None] * x_n + d[None, :], mask=inside, other=0.0)
    entry = entry.to(thresholds.dtype.element_ty)
    finite = tl.min(is_finite(entry).to(tl.int32), axis=1) > 0  # [BN]
    position = tl.zeros([BN, BD], tl.int32)
    for i in tl.static_range(STEPS):
        step = 1 << (STEPS - 1 - i)
        edge = thresholds + (d * ((1 << STEPS) - 1) + step - 1)[None, :] + position
        position += tl.where(entry >= tl.load(edge, mask=inside, other=0.0), step, 0)
    code = tl.load(codes + (d << STEPS)[None, :] + position, mask=inside, other=0.0)
    place = (head * num_rows + row)[:, None] * dim + d[None, :]
    tl.store(quantized + place, tl.where(finite[:, None], code, float("nan")), mask=inside)
    stride = tl.load(strides + d, mask=d < dim, other=0)
    index = tl.sum(position.to(tl.int64) * stride[None, :], axis=1)
    tl.store(indices + head * num_rows + row, tl.where(finite, index, -1), mask=row < num_rows)


@triton.jit
def finite_scalar_quantize_bwd_kernel(
    x: tensor, indices: tensor, grad_quantized: tensor, slopes: tensor, grad_x: tensor, num_rows: tensor, dim: tensor,
    x_h: tensor, x_n: tensor, g_h: tensor, g_n: tensor, g_d: tensor, tiles: tensor,
    BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """slopes (2, D): the slopes and the shifts of the columns."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    inside = (row < num_rows)[:, None] & (d < dim)[None, :]  # [BN, BD]
    used = inside & (tl.load(indices + head * num_rows + row, mask=row < num_rows, other=-1) >= 0)[:, None]
    wide = slopes.dtype.element_ty
    entry = tl.load(x + head * x_h + row[:, None] * x_n + d[None, :], mask=used, other=0.0).to(wide)
    grad = tl.load(
        grad_quantized + head * g_h + row[:, None] * g_n + d.to(tl.int64)[None, :] * g_d, mask=used, other=0.0
    ).to(wide)
    slope = tl.load(slopes + d, mask=d < dim, other=0.0)[None, :]
    shift = tl.load(slopes + dim + d, mask=d < dim, other=0.0)[None, :]
    e = tl.exp(-2.0 * tl.abs(entry + shift))  # 1 − tanh² = 4e / (1 + e)², which does not cancel
    grad = grad * slope * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    out = grad_x + (head * num_rows + row)[:, None] * dim + d[None, :]
    tl.store(out, grad.to(grad_x.dtype.element_ty), mask=inside)


def finite_scalar_quantize(x: Tensor, levels: list[int], symmetric: bool) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.finite_scalar_quantize`. ``x`` (H, N, D)."""
    x, (heads, rows, dim) = unit_inner(x), x.shape
    thresholds, codes, _, strides = tables(tuple(levels), symmetric, x.dtype, x.device)
    quantized, indices = x.new_empty(x.shape), x.new_empty((heads, rows), dtype=torch.int64)
    tile = tuning.scalars(tuning.target_of(x.device), dim)
    tiles = triton.cdiv(rows, tile.rows)
    if heads * tiles:
        with on_device(x):
            finite_scalar_quantize_fwd_kernel[(heads * tiles,)](
                x, thresholds, codes, strides, quantized, indices, rows, dim, *x.stride()[:2], tiles,
                thresholds.shape[1].bit_length(), tile.rows, tile.dim, **tile.options(),
            )  # fmt: skip
    return quantized, indices


def finite_scalar_quantize_backward(
    x: Tensor, indices: Tensor, grad_quantized: Tensor, levels: list[int], symmetric: bool
) -> Tensor:
    """grad_x (H, N, D) in the dtype of x; see the reference for the formula."""
    x, (heads, rows, dim) = unit_inner(x), x.shape
    _, _, slopes, _ = tables(tuple(levels), symmetric, x.dtype, x.device)
    grad_x, tile = x.new_empty(x.shape), tuning.scalars(tuning.target_of(x.device), dim)
    tiles = triton.cdiv(rows, tile.rows)
    if heads * tiles:
        with on_device(x):
            finite_scalar_quantize_bwd_kernel[(heads * tiles,)](
                x, indices.contiguous(), grad_quantized, slopes, grad_x, rows, dim, *x.stride()[:2],
                *grad_quantized.stride(), tiles, tile.rows, tile.dim, **tile.options(),
            )  # fmt: skip
    return grad_x
