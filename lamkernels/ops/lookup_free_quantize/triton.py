"""lookup_free_quantize and its backward in Triton: one pass each; the losses of the tiles are merged in order.

An index is an int64, so a row has at most 62 entries: one tile holds it.
"""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.triton_common import (
    dense_rows,
    finite_rows,
    head_stride,
    load_rows,
    on_device,
    store_rows,
    unit_inner,
)

LARGEST = tl.constexpr(1000.0)  # a logit whose other probability is 0 in every dtype
MERGED = 256  # tiles that the merging kernel adds at a time


@triton.jit
def joined(high: tensor, middle: tensor, low: tensor, WIDE: tl.constexpr) -> tensor:
    """A factor: Triton passes numbers as fp32, so an fp64 one comes in three parts."""
    return (tl.cast(high, tl.float64) + tl.cast(middle, tl.float64) + tl.cast(low, tl.float64)).to(WIDE)


@triton.jit
def sign_code(entry: tensor, scale: tensor, KEEP_ZERO: tl.constexpr) -> tensor:
    code = tl.where(entry > 0, scale, -scale)
    if KEEP_ZERO:
        code = tl.where(entry == 0, 0.0, code)
    return code


@triton.jit
def log1p_of_fraction(e: tensor, TERMS: tl.constexpr) -> tensor:
    """log(1 + e), e in [0, 1], as 2 artanh(e / (2 + e)): to relative accuracy where e is tiny, unlike log(1 + e)."""
    r = e / (2.0 + e)
    square = r * r
    series = square * 0.0 + 1.0 / (2 * TERMS + 1)
    for i in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return 2.0 * r * series


@triton.jit
def lookup_free_fwd_kernel(
    x: tensor, mask: tensor, quantized: tensor, indices: tensor, part_losses: tensor, num_rows: tensor, x_h: tensor,
    x_n: tensor, q_h: tensor, m_h: tensor, m_n: tensor, tiles: tensor, scale_high: tensor, scale_middle: tensor,
    scale_low: tensor, logit_high: tensor, logit_middle: tensor, logit_low: tensor,
    MASK: tl.constexpr, KEEP_ZERO: tl.constexpr, WIDE: tl.constexpr, TERMS: tl.constexpr, DENSE: tl.constexpr,
    DIM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """Per tile also Σ (x − q)², Σ H(σ(4βs·x)) and the number of rows that are in, (H, T, 3) fp64."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BN
    left = tl.minimum(num_rows - first, BN).to(tl.int32)
    row, d = first + tl.arange(0, BN), tl.arange(0, BD)
    kept = row < num_rows
    if MASK:
        kept = kept & (tl.load(mask + head * m_h + row * m_n, mask=kept, other=0) != 0)
    entry = load_rows(x + head * x_h + first * x_n, left, x_n, 1, DENSE, DIM, BN, BD).to(WIDE)  # [BN, BD]
    scale = joined(scale_high, scale_middle, scale_low, WIDE)
    logit_scale = joined(logit_high, logit_middle, logit_low, WIDE)
    used = kept & finite_rows(entry, BD)  # [BN]
    code = sign_code(entry, scale, KEEP_ZERO)
    value = tl.where(used[:, None], code, tl.where(kept, float("nan"), 0.0)[:, None])
    store_rows(quantized + head * q_h + first * DIM, left, value.to(quantized.dtype.element_ty), DIM, BN, BD)
    word = tl.int32 if DIM < 32 else tl.int64
    place_value = tl.where(d < DIM, tl.full([BD], 1, word) << tl.maximum(DIM - 1 - d, 0).to(word), 0)
    index = tl.sum(tl.where(entry > 0, place_value[None, :], 0), axis=1).to(tl.int64)
    tl.store(indices + head * num_rows + row, tl.where(used, index, -1), mask=row < num_rows)
    summed = used[:, None] & (d < DIM)[None, :]
    residual = tl.where(summed, entry - code, 0.0)
    logit = tl.where(summed, tl.minimum(tl.abs(logit_scale * entry), LARGEST), LARGEST)
    e = tl.exp(-logit)
    entropy = log1p_of_fraction(e, TERMS) + logit * e / (1.0 + e)  # 0 at the largest logit
    part = part_losses + tl.program_id(0).to(tl.int64) * 3
    tl.store(part, tl.sum(tl.sum(residual * residual, axis=1).to(tl.float64), axis=0))
    tl.store(part + 1, tl.sum(tl.sum(entropy, axis=1).to(tl.float64), axis=0))
    tl.store(part + 2, tl.sum(used.to(tl.float64), axis=0))


@triton.jit
def lookup_free_merge_kernel(
    part_losses: tensor, commitment_loss: tensor, sample_entropy: tensor, rows_in: tensor, tiles: tensor, dim: tensor,
    BP: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    commitment, entropy = tl.zeros([BP], tl.float64), tl.zeros([BP], tl.float64)
    rows = tl.zeros([BP], tl.float64)
    for first in range(0, tiles, BP):
        tile = first + tl.arange(0, BP)
        part = part_losses + (head * tiles + tile) * 3
        commitment += tl.load(part, mask=tile < tiles, other=0.0)
        entropy += tl.load(part + 1, mask=tile < tiles, other=0.0)
        rows += tl.load(part + 2, mask=tile < tiles, other=0.0)
    count = tl.sum(rows, axis=0)
    tl.store(rows_in + head, count.to(tl.int64))
    commitment_sum = tl.sum(commitment, axis=0) / tl.maximum(count * dim, 1.0)
    tl.store(commitment_loss + head, commitment_sum.to(commitment_loss.dtype.element_ty))
    entropy_sum = tl.sum(entropy, axis=0) / tl.maximum(count, 1.0)
    tl.store(sample_entropy + head, entropy_sum.to(sample_entropy.dtype.element_ty))


@triton.jit
def lookup_free_bwd_kernel(
    x: tensor, indices: tensor, rows_in: tensor, grad_quantized: tensor, grad_commitment: tensor, grad_entropy: tensor,
    grad_x: tensor, num_rows: tensor, x_h: tensor, x_n: tensor, g_h: tensor, g_n: tensor, g_d: tensor, out_h: tensor,
    commitment_h: tensor, entropy_h: tensor, tiles: tensor, scale_high: tensor, scale_middle: tensor, scale_low: tensor,
    logit_high: tensor, logit_middle: tensor, logit_low: tensor,
    GRAD: tl.constexpr, KEEP_ZERO: tl.constexpr, WIDE: tl.constexpr, DENSE: tl.constexpr, G_DENSE: tl.constexpr,
    DIM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BN
    left = tl.minimum(num_rows - first, BN).to(tl.int32)
    row = first + tl.arange(0, BN)
    used = tl.load(indices + head * num_rows + row, mask=row < num_rows, other=-1) >= 0  # [BN]
    entry = load_rows(x + head * x_h + first * x_n, left, x_n, 1, DENSE, DIM, BN, BD).to(WIDE)  # [BN, BD]
    scale = joined(scale_high, scale_middle, scale_low, WIDE)
    logit_scale = joined(logit_high, logit_middle, logit_low, WIDE)
    count = tl.maximum(tl.load(rows_in + head), 1).to(tl.float64)
    commitment = tl.load(grad_commitment + head * commitment_h).to(tl.float64) * (2.0 / (count * DIM))
    entropy = tl.load(grad_entropy + head * entropy_h).to(tl.float64) / count
    logit = tl.minimum(tl.maximum(logit_scale * entry, -LARGEST), LARGEST)
    e = tl.exp(-tl.abs(logit))
    slope = logit * (e / ((1.0 + e) * (1.0 + e)))
    grad = commitment.to(WIDE) * (entry - sign_code(entry, scale, KEEP_ZERO))
    grad -= (entropy * logit_scale).to(WIDE) * slope
    if GRAD:
        grad += load_rows(grad_quantized + head * g_h + first * g_n, left, g_n, g_d, G_DENSE, DIM, BN, BD).to(WIDE)
    grad = tl.where(used[:, None], grad, 0.0).to(grad_x.dtype.element_ty)
    store_rows(grad_x + head * out_h + first * DIM, left, grad, DIM, BN, BD)


def lookup_free_quantize(
    x: Tensor, mask: Tensor | None, scale: float, logit_scale: float, keep_zero: bool
) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.lookup_free_quantize`. ``x`` (H, N, D), ``mask`` (H, N) bool or None."""
    x, (heads, rows, dim) = unit_inner(x), x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    quantized, indices = x.new_empty(x.shape), x.new_empty((heads, rows), dtype=torch.int64)
    commitment, entropy = x.new_empty((heads,), dtype=wide), x.new_empty((heads,), dtype=wide)
    rows_in = x.new_empty((heads,), dtype=torch.int64)
    tile = tuning.scalars(tuning.target_of(x.device), dim)
    tiles = tuning.ceil_div(rows, tile.rows)
    part_losses = x.new_empty((heads, tiles, 3), dtype=torch.float64)
    with on_device(x):
        if heads * tiles:
            lookup_free_fwd_kernel[(heads * tiles,)](
                x, indices if mask is None else mask, quantized, indices, part_losses, rows, head_stride(x),
                x.stride(1), head_stride(quantized), *((0, 0) if mask is None else mask.stride()), tiles,
                *_parts(scale), *_parts(logit_scale), mask is not None, keep_zero, *_arithmetic(x), dense_rows(x), dim,
                tile.rows, tile.dim, **tile.options(),
            )  # fmt: skip
        if heads:
            lookup_free_merge_kernel[(heads,)](
                part_losses, commitment, entropy, rows_in, tiles, dim, MERGED, **tuning.PLAIN.options()
            )
    return quantized, indices, commitment, entropy, rows_in


def lookup_free_quantize_backward(
    x: Tensor, indices: Tensor, num_rows: Tensor, grad_quantized: Tensor | None, grad_commitment: Tensor,
    grad_entropy: Tensor, scale: float, logit_scale: float, keep_zero: bool,
) -> Tensor:  # fmt: skip
    """grad_x (H, N, D) in the dtype of x; see the reference for the formula."""
    x, (heads, rows, dim) = unit_inner(x), x.shape
    grad = x if grad_quantized is None else grad_quantized
    grad_x, tile = x.new_empty(x.shape), tuning.scalars(tuning.target_of(x.device), dim)
    tiles = tuning.ceil_div(rows, tile.rows)
    if heads * tiles:
        with on_device(x):
            lookup_free_bwd_kernel[(heads * tiles,)](
                x, indices.contiguous(), num_rows.contiguous(), grad, grad_commitment, grad_entropy, grad_x,
                rows, head_stride(x), x.stride(1), head_stride(grad), *grad.stride()[1:], head_stride(grad_x),
                grad_commitment.stride(0), grad_entropy.stride(0), tiles, *_parts(scale), *_parts(logit_scale),
                grad_quantized is not None, keep_zero, _arithmetic(x)[0], dense_rows(x), dense_rows(grad), dim,
                tile.rows, tile.dim, **tile.options(),
            )  # fmt: skip
    return grad_x


def _parts(value: float) -> tuple[float, float, float]:
    """A number as the exact sum of three fp32 numbers."""
    high = float(np.float32(value))
    middle = float(np.float32(value - high))
    return high, middle, value - high - middle


def _arithmetic(x: Tensor) -> tuple[tl.dtype, int]:
    """The type that rows are computed in, and terms of the logarithm's series: (1/9)^terms is below its rounding."""
    return (tl.float64, 17) if x.dtype == torch.float64 else (tl.float32, 8)
