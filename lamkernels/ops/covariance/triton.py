"""covariance on a GPU: tiles of the upper triangle times a split of the rows, fp64 partial sums, merged in order.

Rows are shifted by a provisional mean of evenly spaced ones and multiplied in fp32 (three tf32 products) over at most
``FLUSH`` rows, whose sums go to fp64 in memory that a program owns: no atomics. Column sums come from the tiles on the
diagonal in the same pass. The partition depends on the shape and the device alone.
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
from lamkernels.ops.covariance.gpu import Factor, moments
from lamkernels.ops.triton_common import dot, fp32_product, is_finite, on_device, persistent_programs, unit_inner

FLUSH = tl.constexpr(1024)  # rows that are added up in fp32


@triton.jit
def pair_weights_kernel(
    x: tensor, y: tensor, given: tensor, weights: tensor, num_pairs: tensor, dim: tensor, other: tensor, x_h: tensor,
    x_n: tensor, y_h: tensor, y_n: tensor, g_h: tensor, g_n: tensor, tiles: tensor,
    GIVEN: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """weights (H, P) fp64: the weight of each pair, 0 where it is not positive and finite or a row is not finite."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
    weight = tl.where(n < num_pairs, 1.0, 0.0).to(tl.float64)
    if GIVEN:
        weight = tl.load(given + head * g_h + n * g_n, mask=n < num_pairs, other=0.0)
    inside = (weight > 0) & is_finite(weight)
    for start in range(0, dim, BD):
        inside = inside & finite_part(x + head * x_h, x_n, n, start, dim, inside, BD)
    for start in range(0, other, BD):
        inside = inside & finite_part(y + head * y_h, y_n, n, start, other, inside, BD)
    tl.store(weights + head * num_pairs + n, tl.where(inside, weight, 0.0), mask=n < num_pairs)


@triton.jit
def finite_part(
    rows: tensor, stride: tensor, n: tensor, start: tensor, dim: tensor, wanted: tensor, BD: tl.constexpr
) -> tensor:  # fmt: skip
    """Whether BD entries of each wanted row are finite."""
    d = start + tl.arange(0, BD)
    mask = wanted[:, None] & (d < dim)[None, :]  # [BN, BD]
    entry = tl.load(rows + n[:, None] * stride + d[None, :], mask=mask, other=0.0)
    if entry.dtype != tl.float64:
        entry = entry.to(tl.float32)
    return tl.min(is_finite(entry).to(tl.int32), axis=1) > 0


@triton.jit
def scatter_kernel(
    x: tensor, y: tensor, weights: tensor, shift_x: tensor, shift_y: tensor, parts: tensor, sums: tensor,
    num_pairs: tensor, dim: tensor, other: tensor, x_h: tensor, x_n: tensor, y_h: tensor, y_n: tensor, tiles: tensor,
    across: tensor, splits: tensor, size: tensor,
    SYMMETRIC: tl.constexpr, MATRIX: tl.constexpr, DOT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """parts (H, S, D, E) += Σ w (x − shift)(y − shift)ᵀ, and sums (H, S, D) += Σ w (x − shift), for a tile and a split.

    With SYMMETRIC the tiles are those of the upper triangle, row by row, and sums are added up on the diagonal.
    """
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if SYMMETRIC:
        i = tile * 0
        while tile >= across - i:
            tile -= across - i
            i += 1
        j = i + tile
    else:
        i = tile // across
        j = tile % across
    head = (split // splits).to(tl.int64)
    first = (split % splits).to(tl.int64) * size
    stop = tl.minimum(first + size, num_pairs)
    at_x = i * BD + tl.arange(0, BD)
    at_y = j * BD + tl.arange(0, BD)
    shift_of_x = tl.load(shift_x + head * dim + at_x, mask=at_x < dim, other=0.0)
    shift_of_y = tl.load(shift_y + head * other + at_y, mask=at_y < other, other=0.0)
    wide = shift_x.dtype.element_ty
    out = parts + split.to(tl.int64) * dim * other + at_x[:, None].to(tl.int64) * other + at_y[None, :]
    inside_out = (at_x < dim)[:, None] & (at_y < other)[None, :]  # [BD, BD]
    for flush in range(first, stop, FLUSH):
        product = tl.zeros([BD, BD], wide)
        column = tl.zeros([BD], wide)
        for start in range(flush, tl.minimum(flush + FLUSH, stop), BN):
            n = start + tl.arange(0, BN)
            weight = tl.load(weights + head * num_pairs + n, mask=n < stop, other=0.0).to(wide)
            mask_x = (weight > 0)[:, None] & (at_x < dim)[None, :]  # [BN, BD]
            mask_y = (weight > 0)[:, None] & (at_y < other)[None, :]
            a = tl.load(x + head * x_h + n[:, None] * x_n + at_x[None, :], mask=mask_x, other=0.0).to(wide)
            b = tl.load(y + head * y_h + n[:, None] * y_n + at_y[None, :], mask=mask_y, other=0.0).to(wide)
            a = tl.where(mask_x, (a - shift_of_x[None, :]) * weight[:, None], 0.0)
            b = tl.where(mask_y, b - shift_of_y[None, :], 0.0)
            if MATRIX:
                if DOT == "split":
                    product += dot(tl.trans(a), b, DOT)
                else:
                    product = tl.dot(tl.trans(a), b, product, input_precision=DOT, out_dtype=wide)
            else:
                product += tl.sum(a[:, :, None] * b[:, None, :], axis=0)
            if SYMMETRIC:
                column += tl.sum(a, axis=0)
        tl.store(out, tl.load(out, mask=inside_out, other=0.0) + product.to(tl.float64), mask=inside_out)
        if SYMMETRIC:  # noqa: SIM102  # decided by the compiler; the next line by each program
            if i == j:
                to = sums + split.to(tl.int64) * dim + at_x
                tl.store(to, tl.load(to, mask=at_x < dim, other=0.0) + column.to(tl.float64), mask=at_x < dim)


def partial_products(left: Factor, right: Factor, weights: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Σ w (x − shift)(y − shift)ᵀ (H, D, E), or its upper triangle, and Σ w (x − shift) (H, D), both fp64."""
    x, y, target = left.x, right.x, tuning.target_of(left.x.device)
    (heads, num_pairs, dim), other = x.shape, y.shape[2]
    wide = left.shift.dtype == torch.float64
    tile = tuning.products(target, dim, other, wide)
    down, across = triton.cdiv(dim, tile.dim), triton.cdiv(other, tile.dim)
    tiles = across * (across + 1) // 2 if symmetric else down * across
    splits = max(1, min(persistent_programs(x.device) // tiles, triton.cdiv(num_pairs, FLUSH.value)))
    size = triton.cdiv(triton.cdiv(num_pairs, splits), tile.rows) * tile.rows
    parts = x.new_zeros((heads, splits, dim, other), dtype=torch.float64)
    sums = x.new_zeros((heads, splits, dim), dtype=torch.float64)
    if parts.numel() and num_pairs:
        matrix = not (wide and target.startswith("gfx"))  # where fp64 products do not compile in every release
        scatter_kernel[(heads * splits * tiles,)](
            x, y, weights, left.shift, right.shift, parts, sums, num_pairs, dim, other, *x.stride()[:2],
            *y.stride()[:2], tiles, across, splits, size, symmetric, matrix, "ieee" if wide else fp32_product(target),
            tile.rows, tile.dim, **tile.options(),
        )  # fmt: skip
    return parts.sum(1), sums.sum(1)


def pair_weights(first: Tensor, second: Tensor, given: Tensor | None) -> Tensor:
    """The weight (H, P) fp64 of each pair of rows (H, P, D) and (H, P, E); 0 for one that is out."""
    (heads, num_pairs, dim), other = first.shape, second.shape[2]
    weights = first.new_empty((heads, num_pairs), dtype=torch.float64)
    tile = tuning.elementwise(tuning.target_of(first.device), dim)
    tiles = triton.cdiv(num_pairs, tile.rows)
    if heads * tiles:
        source = weights if given is None else given
        pair_weights_kernel[(heads * tiles,)](
            first, second, source, weights, num_pairs, dim, other, *first.stride()[:2], *second.stride()[:2],
            *source.stride(), tiles, given is not None, tile.rows, tile.dim, **tile.options(),
        )  # fmt: skip
    return weights


def covariance(x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, precision: str) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.moments`. ``x`` (H, N, D), ``y`` (H, N, E) or None, ``weights`` (H, max(N − lag, 0))."""
    x, y = unit_inner(x), None if y is None else unit_inner(y)
    computed = torch.float64 if precision == "exact" or x.dtype == torch.float64 else torch.float32
    with on_device(x):
        return moments(x, y, weights, lag, computed, pair_weights, partial_products)
