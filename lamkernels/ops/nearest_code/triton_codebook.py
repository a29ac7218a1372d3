"""A codebook made ready to be streamed: padded to whole tiles, with its half norms; two kernels, four with a centre."""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.triton_common import finite_in_memory, grid_centre, is_finite, product_limit

CODES_PER_PROGRAM = 16


class ReadyCodebook(NamedTuple):
    """What nearest_code_streamed_kernel reads; K and D are padded to whole tiles."""

    codes: Tensor  # (H, K, D): centred, 0 where the code is not finite
    centre: Tensor  # (H, D) fp32
    half_norm: Tensor  # (H, K) fp32: less the smallest one, +inf where the code is not finite; 0 for dot products
    limit: Tensor  # (H,) fp32: see product_limit


@triton.jit
def code_flags_kernel(
    codebook: tensor, flags: tensor, num_codes: tensor, dim: tensor, stride_h: tensor, stride_k: tensor, tiles: tensor,
    BK: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """flags (H, K) int8: 1 for a finite code."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    row = codebook + head * stride_h + k.to(tl.int64) * stride_k
    finite = finite_in_memory(row, 1, k < num_codes, dim, BD)
    tl.store(flags + head * num_codes + k, finite.to(tl.int8), mask=k < num_codes)


@triton.jit
def column_centre_kernel(
    codebook: tensor, flags: tensor, centre: tensor, num_codes: tensor, dim: tensor, padded_dim: tensor,
    stride_h: tensor, stride_k: tensor, tiles: tensor,
    BK: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """centre (H, padded D) fp32: see grid_centre."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    column = codebook + head * stride_h + d
    count = tl.zeros([BK], tl.float32)
    total = tl.zeros([BK, BD], tl.float32)
    for start in range(0, num_codes, BK):
        k = start + tl.arange(0, BK)
        finite = tl.load(flags + head * num_codes + k, mask=k < num_codes, other=0) > 0
        inside = finite[:, None] & (d < dim)[None, :]  # [BK, BD]
        count += finite.to(tl.float32)
        total += tl.load(column[None, :] + k.to(tl.int64)[:, None] * stride_k, mask=inside, other=0.0).to(tl.float32)
    size = tl.maximum(tl.sum(count, axis=0), 1.0)
    mean = tl.div_rn(tl.sum(total, axis=0), size + tl.zeros([BD], tl.float32))
    square = tl.zeros([BK, BD], tl.float32)
    for start in range(0, num_codes, BK):
        k = start + tl.arange(0, BK)
        finite = tl.load(flags + head * num_codes + k, mask=k < num_codes, other=0) > 0
        inside = finite[:, None] & (d < dim)[None, :]
        code = tl.load(column[None, :] + k.to(tl.int64)[:, None] * stride_k, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, code - mean[None, :], 0.0)
        square += deviation * deviation
    tl.store(centre + head * padded_dim + d, grid_centre(mean, tl.sum(square, axis=0) / size), mask=d < padded_dim)


@triton.jit
def centred_codes_kernel(
    codebook: tensor, flags: tensor, centre: tensor, codes: tensor, norms: tensor, largest: tensor, num_codes: tensor,
    dim: tensor, padded_codes: tensor, padded_dim: tensor, stride_h: tensor, stride_k: tensor, tiles: tensor,
    CENTRE: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """codes (H, padded K, padded D): centred, 0 where not finite; (H, padded K) norms fp64 and largest |entry| fp32."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    row = codebook + head * stride_h + k.to(tl.int64) * stride_k
    if CENTRE:
        finite = tl.load(flags + head * num_codes + k, mask=k < num_codes, other=0) > 0
    else:
        finite = finite_in_memory(row, 1, k < num_codes, dim, BD)
    out = (head * padded_codes + k) * padded_dim  # [BK]
    norm = tl.zeros([BK], tl.float64)
    top = tl.zeros([BK], tl.float32)
    for start in range(0, padded_dim, BD):
        d = start + tl.arange(0, BD)
        inside = finite[:, None] & (d < dim)[None, :]  # [BK, BD]
        code = tl.load(row[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        middle = tl.zeros([BD], tl.float32)
        if CENTRE:
            middle = tl.load(centre + head * padded_dim + d)
        exact = tl.where(inside, code.to(tl.float64) - middle.to(tl.float64)[None, :], 0.0)
        norm += tl.sum(exact * exact, axis=1)
        centred = tl.where(inside, code - middle[None, :], 0.0)
        top = tl.maximum(top, tl.max(tl.abs(centred), axis=1))
        tl.store(codes + out[:, None] + d[None, :], centred.to(codes.dtype.element_ty))
    tl.store(norms + head * padded_codes + k, tl.where(finite, norm * 0.5, float("inf")))
    tl.store(largest + head * padded_codes + k, top)


@triton.jit
def relative_norms_kernel(
    norms: tensor, largest: tensor, half_norm: tensor, limit: tensor, dim: tensor, padded_codes: tensor,
    L2: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """half_norm (H, padded K) fp32: norms less the smallest one, +inf for a code that is not finite; limit (H,)."""
    head = tl.program_id(0).to(tl.int64)
    smallest = tl.full([BK], float("inf"), tl.float64)
    norm_top = tl.zeros([BK], tl.float32)
    code_top = tl.zeros([BK], tl.float32)
    for start in range(0, padded_codes, BK):
        k = start + tl.arange(0, BK)
        norm = tl.load(norms + head * padded_codes + k, mask=k < padded_codes, other=float("inf"))
        smallest = tl.minimum(smallest, norm)
        norm_top = tl.maximum(norm_top, tl.where(is_finite(norm), norm, 0.0).to(tl.float32))
        code_top = tl.maximum(code_top, tl.load(largest + head * padded_codes + k, mask=k < padded_codes, other=0.0))
    base = tl.min(smallest, axis=0)
    for start in range(0, padded_codes, BK):
        k = start + tl.arange(0, BK)
        norm = tl.load(norms + head * padded_codes + k, mask=k < padded_codes, other=float("inf"))
        relative = tl.where(is_finite(norm), norm - base, 0.0).to(tl.float32)
        if not L2:
            relative = tl.zeros([BK], tl.float32)
        relative = tl.where(is_finite(norm), relative, float("inf"))
        tl.store(half_norm + head * padded_codes + k, relative, mask=k < padded_codes)
    tl.store(limit + head, product_limit(tl.max(code_top, axis=0), tl.max(norm_top, axis=0), dim))


def ready_codebook(codebook: Tensor, tile: tuning.Tile, l2: bool, centred: bool, dtype: torch.dtype) -> ReadyCodebook:
    """``codebook`` (H, K, D) ready for tiles of ``tile.codes`` codes and ``tile.dim`` entries, stored as ``dtype``."""
    heads, num_codes, dim = codebook.shape
    padded = (tuning.ceil_div(num_codes, tile.codes) * tile.codes, tuning.ceil_div(dim, tile.dim) * tile.dim)
    codes = codebook.new_empty((heads, *padded), dtype=dtype)
    centre = codebook.new_empty((heads, padded[1]), dtype=torch.float32)
    half_norm, largest = codebook.new_empty((2, heads, padded[0]), dtype=torch.float32)
    norms = codebook.new_empty((heads, padded[0]), dtype=torch.float64)
    limit = codebook.new_empty((heads,), dtype=torch.float32)
    flags = codebook.new_empty((heads, num_codes if centred else 0), dtype=torch.int8)
    strides, per, plain = codebook.stride()[:2], CODES_PER_PROGRAM, tuning.PLAIN.options()
    if centred:
        tiles = tuning.ceil_div(num_codes, per)
        code_flags_kernel[(heads * tiles,)](codebook, flags, num_codes, dim, *strides, tiles, per, tile.dim, **plain)
        tiles = tuning.ceil_div(padded[1], 16)
        column_centre_kernel[(heads * tiles,)](
            codebook, flags, centre, num_codes, dim, padded[1], *strides, tiles, 128, 16, **plain
        )
    tiles = padded[0] // per
    centred_codes_kernel[(heads * tiles,)](
        codebook, flags, centre, codes, norms, largest, num_codes, dim, *padded, *strides, tiles, centred, per,
        tile.dim, **plain,
    )  # fmt: skip
    relative_norms_kernel[(heads,)](norms, largest, half_norm, limit, dim, padded[0], l2, 1024, **plain)
    return ReadyCodebook(codes, centre, half_norm, limit)
