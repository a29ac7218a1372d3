"""covariance on a GPU: tiles of the upper triangle times a split of the rows, fp64 partial sums, merged in order.

Rows are shifted by a provisional mean of evenly spaced ones and multiplied in fp32 (as tf32 products that keep 22 bits)
over at most ``FLUSH`` rows, whose sums go to fp64 in memory that a program owns: no atomics. Column sums come from the
tiles on the diagonal in the same pass. Unweighted rows that fit one tile are checked there, and a covariance is three
launches; others are checked before, in a pass of their own. The partition depends on the shape and the device alone.
"""

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
from lamkernels.ops.covariance.reference import pairs
from lamkernels.ops.triton_common import (
    dot,
    finite_in_memory,
    finite_rows,
    fp32_product,
    is_finite,
    on_device,
    persistent_programs,
    power_above,
    round_to_tf32,
    unit_inner,
)

FLUSH = tl.constexpr(1024)  # rows that are added up in fp32
SAMPLE, STRIP = 256, 16  # rows that the provisional mean is computed from, and columns of one of its programs
MERGED = 1024  # entries of parts that a program of the merge reads at a time


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
    inside = finite_in_memory(x + head * x_h + n * x_n, 1, inside, dim, BD)
    inside = finite_in_memory(y + head * y_h + n * y_n, 1, inside, other, BD)
    tl.store(weights + head * num_pairs + n, tl.where(inside, weight, 0.0), mask=n < num_pairs)


@triton.jit
def shift_kernel(
    x: tensor, weights: tensor, shift: tensor, num_pairs: tensor, dim: tensor, x_h: tensor, x_n: tensor,
    strips: tensor, step: tensor, WHOLE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """shift (H, D): the mean of every ``step``-th row that is in, to 1/16 of the spread of a column.

    So integers and pixels keep their grid, and their products stay exact. For WHOLE see :func:`scatter_kernel`.
    """
    head = (tl.program_id(0) // strips).to(tl.int64)
    d = tl.program_id(0) % strips * BD + tl.arange(0, BD)
    n = tl.arange(0, BN).to(tl.int64) * step
    inside = n < num_pairs
    if WHOLE:
        inside = finite_in_memory(x + head * x_h + n * x_n, 1, inside, dim, BD)
    else:
        inside = tl.load(weights + head * num_pairs + n, mask=inside, other=0.0) > 0
    mask = inside[:, None] & (d < dim)[None, :]  # [BN, BD]
    entry = tl.load(x + head * x_h + n[:, None] * x_n + d[None, :], mask=mask, other=0.0).to(tl.float64)
    count = tl.maximum(tl.sum(inside.to(tl.int32), axis=0), 1).to(tl.float64)
    mean = tl.sum(entry, axis=0) / count
    deviation = tl.where(mask, entry - mean[None, :], 0.0)
    spread = tl.sqrt(tl.sum(deviation * deviation, axis=0) / count).to(tl.float32)
    power = power_above(spread)
    usable = (power > 0) & is_finite(power)
    grid = tl.where(usable, power, 1.0).to(tl.float64) / 16
    rounded = tl.where(usable, tl.floor(mean / grid + 0.5) * grid, mean)
    tl.store(shift + head * dim + d, rounded.to(shift.dtype.element_ty), mask=d < dim)


@triton.jit
def scatter_kernel(
    x: tensor, y: tensor, weights: tensor, shift_x: tensor, shift_y: tensor, parts: tensor, sums: tensor,
    counts: tensor, num_pairs: tensor, dim: tensor, other: tensor, x_h: tensor, x_n: tensor, y_h: tensor, y_n: tensor,
    tiles: tensor, across: tensor, splits: tensor, size: tensor,
    SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, WEIGHTED: tl.constexpr, DOT: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
) -> None:  # fmt: skip
    """parts (H, S, D, E) = Σ w (x − shift)(y − shift)ᵀ and, with SYMMETRIC, sums (H, S, D) = Σ w (x − shift).

    Of a tile and a split of the rows. With SYMMETRIC y is x, the tiles are those of the upper triangle, row by row, and
    sums come from those on the diagonal. With WHOLE, too, there is one tile and no weights: rows that are not finite
    are left out here, and counts (H, S) are of the others. Else ``weights`` (H, P) are 0 for what is out, and without
    WEIGHTED 1 for what is in.
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
    rows = tl.minimum(num_pairs - first, size).to(tl.int32)
    x += head * x_h + first * x_n
    y += head * y_h + first * y_n
    weights += head * num_pairs + first
    d = tl.arange(0, BD)
    at_x, at_y = i * BD + d, j * BD + d
    shift_of_x = tl.load(shift_x + head * dim + at_x, mask=at_x < dim, other=0.0)
    shift_of_y = tl.load(shift_y + head * other + at_y, mask=at_y < other, other=0.0)
    wide = shift_x.dtype.element_ty
    corner = (split.to(tl.int64) * dim + i * BD) * other + j * BD
    out = parts + corner + (d[:, None] * other + d[None, :])
    inside_out = (at_x < dim)[:, None] & (at_y < other)[None, :]  # [BD, BD]
    count = tl.zeros([BN], tl.int32)
    for flush in range(0, rows, FLUSH):
        product = tl.zeros([BD, BD], wide)
        column = tl.zeros([BN, BD] if WHOLE else [BD], wide)
        for start in range(flush, tl.minimum(flush + FLUSH, rows), BN):
            n = start + tl.arange(0, BN)
            inside = n < rows
            at_row = n.to(tl.int64)[:, None]
            if WHOLE:
                a = tl.load(x + at_row * x_n + at_x[None, :], mask=inside[:, None] & (at_x < dim)[None, :], other=0.0)
                a = a.to(wide)
                inside = inside & finite_rows(a, BD)
                count += inside.to(tl.int32)
                a = tl.where(inside[:, None], a - shift_of_x[None, :], 0.0)
                b = a
            else:
                weight = tl.load(weights + n, mask=inside, other=0.0)
                mask_x = (weight > 0)[:, None] & (at_x < dim)[None, :]  # [BN, BD]
                mask_y = (weight > 0)[:, None] & (at_y < other)[None, :]
                a = tl.load(x + at_row * x_n + at_x[None, :], mask=mask_x, other=0.0).to(wide)
                b = tl.load(y + at_row * y_n + at_y[None, :], mask=mask_y, other=0.0).to(wide)
                a = (a - shift_of_x[None, :]) * weight[:, None]
                b = (b - shift_of_y[None, :]) * (tl.where(weight > 0, 1.0, 0.0) if WEIGHTED else weight)[:, None]
            if WHOLE:
                column += a
            elif SYMMETRIC:  # noqa: SIM102  # decided by the compiler; the next line by each program
                if i == j:
                    column += tl.sum(a, axis=0)
            if DOT == "sum":
                product += tl.sum(a[:, :, None] * b[:, None, :], axis=0)
            elif DOT == "split" and WHOLE:  # half of the product, whose transpose is the other half
                high = round_to_tf32(a)
                part = tl.dot(tl.trans(high), a - high, input_precision="tf32", out_dtype=wide)
                product += tl.dot(tl.trans(high), high * 0.5, part, input_precision="tf32")
            elif DOT == "split":
                product += dot(tl.trans(a), b, DOT)
            else:
                product = tl.dot(tl.trans(a), b, product, input_precision=DOT, out_dtype=wide)
        if WHOLE:
            column = tl.sum(column, axis=0)
            if DOT == "split":
                product += tl.trans(product)
        more = inside_out & (flush > 0)
        tl.store(out, tl.load(out, mask=more, other=0.0) + product.to(tl.float64), mask=inside_out)
        if SYMMETRIC:  # noqa: SIM102
            if i == j:
                to = sums + split.to(tl.int64) * dim + at_x
                before = tl.load(to, mask=(at_x < dim) & (flush > 0), other=0.0)
                tl.store(to, before + column.to(tl.float64), mask=at_x < dim)
    if WHOLE:
        tl.store(counts + split, tl.sum(count, axis=0).to(tl.float64))


@triton.jit
def added_up(parts: tensor, s: tensor, splits: tensor, stride: tensor, at: tensor, inside: tensor) -> tensor:
    """Of ``parts`` (splits, ...), ``stride`` from one to the next, the sum at ``at`` [BE] over those of ``s`` [SB]."""
    mask = (s < splits)[:, None] & inside[None, :]  # [SB, BE]
    return tl.sum(tl.load(parts + s.to(tl.int64)[:, None] * stride + at[None, :], mask=mask, other=0.0), axis=0)


@triton.jit
def entries_of(block: tensor, columns: tensor, BE: tl.constexpr) -> tuple[tensor, tensor, tensor]:
    """The place [BE] of each entry of a block in a matrix, its row and its column."""
    first = block.to(tl.int64) * BE
    row = first // columns
    k = tl.arange(0, BE)
    at = (first - row * columns).to(tl.int32) + k  # so that the division of all of them is one of 32 bits
    return first + k, row + at // columns, at % columns


@triton.jit
def merge_kernel(
    parts: tensor, sums: tensor, weights: tensor, shift: tensor, scatter: tensor, mean: tensor, step: tensor,
    weight: tensor, dim: tensor, square: tensor, splits: tensor, shares: tensor, blocks: tensor, SB: tl.constexpr,
    BE: tl.constexpr,
) -> None:  # fmt: skip
    """The scatter (H, D, D) about the mean, from the upper triangles of its parts; a program merges BE entries.

    And the mean (H, D), its step from the shift, and the weight (H,), the sum of ``weights`` (H, shares).
    """
    head, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    e, i, j = entries_of(block, dim, BE)
    inside, above, first = e < square, (e < square) & (j >= i), head * splits
    total, of_row = tl.zeros([BE], tl.float64), tl.zeros([BE], tl.float64)
    of_column, value = tl.zeros([BE], tl.float64), tl.zeros([BE], tl.float64)
    for start in range(0, splits, SB):
        s = start + tl.arange(0, SB)
        total += added_up(weights + head * shares, s, shares, 1, e * 0, inside)
        of_row += added_up(sums + first * dim, s, splits, dim, i, inside)
        of_column += added_up(sums + first * dim, s, splits, dim, j, inside)
        value += added_up(parts + first * square, s, splits, square, e, above)
    divisor = tl.where(total > 0, total, 1.0)
    of_row, of_column = of_row / divisor, of_column / divisor
    value -= total * of_row * of_column
    tl.store(scatter + head * square + e, value, mask=above)
    tl.store(scatter + head * square + j * dim + i, value, mask=above)
    on_top = inside & (i == 0)
    near = tl.load(shift + head * dim + j, mask=on_top, other=0.0).to(tl.float64)
    tl.store(mean + head * dim + j, near + of_column, mask=on_top)
    tl.store(step + head * dim + j, of_column, mask=on_top)
    tl.store(weight + head + e, total, mask=e == 0)


@triton.jit
def merge_cross_kernel(
    parts: tensor, step_x: tensor, step_y: tensor, weight: tensor, scatter: tensor, dim: tensor, other: tensor,
    size: tensor, splits: tensor, blocks: tensor, SB: tl.constexpr, BE: tl.constexpr,
) -> None:  # fmt: skip
    """The scatter (H, D, E) about both means, from its parts and what :func:`merge_kernel` found for both sides."""
    head, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    e, i, j = entries_of(block, other, BE)
    of_row = tl.load(step_x + head * dim + i, mask=e < size, other=0.0)
    of_column = tl.load(step_y + head * other + j, mask=e < size, other=0.0)
    value = tl.zeros([BE], tl.float64)
    for start in range(0, splits, SB):
        value += added_up(parts + head * splits * size, start + tl.arange(0, SB), splits, size, e, e < size)
    tl.store(scatter + head * size + e, value - tl.load(weight + head) * of_row * of_column, mask=e < size)


class Side(NamedTuple):
    """Rows (H, P, D), their provisional shift (H, D) in the computed dtype, and the step (H, D) fp64 to their mean."""

    x: Tensor
    shift: Tensor
    step: Tensor


class Plan(NamedTuple):
    """How products of rows (H, P, D) and (H, P, E) are computed: the tile, and the names of a kernel's arguments."""

    tile: tuning.Tile
    dot: str
    tiles: int
    across: int
    splits: int
    size: int


def plan(x: Tensor, y: Tensor, wide: bool, symmetric: bool) -> Plan:
    """Of fp64 products if ``wide``, and of the upper triangle alone if ``symmetric``."""
    target = tuning.target_of(x.device)
    (_, num_pairs, dim), other = x.shape, y.shape[2]
    tile = tuning.products(target, dim, other, wide)
    down, across = tuning.ceil_div(dim, tile.dim), tuning.ceil_div(other, tile.dim)
    tiles = across * (across + 1) // 2 if symmetric else down * across
    places = persistent_programs(x.device) * tuning.programs(tile) // tuning.PROGRAMS
    splits = tuning.splits(tiles, tuning.ceil_div(num_pairs, FLUSH.value), places)
    size = tuning.ceil_div(tuning.ceil_div(num_pairs, splits), tile.rows) * tile.rows
    double = "sum" if target.startswith("gfx") else "ieee"  # fp64 products do not compile in every release for AMD
    return Plan(tile, double if wide else fp32_product(target), tiles, across, tuning.ceil_div(num_pairs, size), size)


def products(left: Side, right: Side, weights: Tensor | None, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`scatter_kernel`; symmetric where both sides are one, and of whole rows without weights (H, P)."""
    x, y, symmetric = left.x, right.x, left is right
    (heads, num_pairs, dim), other = x.shape, y.shape[2]
    how = plan(x, y, left.shift.dtype == torch.float64, symmetric)
    parts = x.new_empty((heads, how.splits, dim, other), dtype=torch.float64)
    sums, counts = parts.new_empty((heads, how.splits, dim)), parts.new_empty((heads, how.splits))
    scatter_kernel[(heads * how.splits * how.tiles,)](
        x, y, counts if weights is None else weights, left.shift, right.shift, parts, sums, counts, num_pairs, dim,
        other, *x.stride()[:2], *y.stride()[:2], how.tiles, how.across, how.splits, how.size, symmetric,
        weights is None, weighted, how.dot, how.tile.rows, how.tile.dim, **how.tile.options(),
    )  # fmt: skip
    return parts, sums, counts


def plain(x: Tensor) -> tuning.Tile:
    """The compiler options of the small kernels."""
    return tuning.PLAIN._replace(registers=tuning.registers(tuning.target_of(x.device)))


def merge_blocks(splits: int, entries: int) -> tuple[int, int, int]:
    """How many programs merge the parts of a scatter, and how many splits and entries one of them reads at a time."""
    at_once = min(tuning.power(splits, 1), 64)
    width = min(MERGED // at_once, 512)
    return tuning.ceil_div(entries, width), at_once, width


def scatter(
    x: Tensor, weights: Tensor | None, total: Tensor | None, weighted: bool, computed: torch.dtype
) -> tuple[Tensor, Side, Tensor, Tensor]:
    """The weight (H,), the rows with their shift and step, their mean (H, D) and centred scatter (H, D, D), fp64.

    Without weights (H, P), and their sum (H, 1), of whole rows, which are checked on the way.
    """
    heads, num_pairs, dim = x.shape
    shift, strips = x.new_empty((heads, dim), dtype=computed), tuning.ceil_div(dim, STRIP)
    shift_kernel[(heads * strips,)](
        x, shift if weights is None else weights, shift, num_pairs, dim, *x.stride()[:2], strips,
        tuning.ceil_div(num_pairs, SAMPLE), weights is None, SAMPLE, STRIP, **plain(x).options(),
    )  # fmt: skip
    mean, step = shift.new_empty((2, heads, dim), dtype=torch.float64)
    side = Side(x, shift, step)
    parts, sums, counts = products(side, side, weights, weighted)
    weight, result = mean.new_empty(heads), mean.new_empty((heads, dim, dim))
    shares = counts if total is None else total
    blocks, at_once, entries = merge_blocks(parts.shape[1], dim * dim)
    merge_kernel[(heads * blocks,)](
        parts, sums, shares, shift, result, mean, step, weight, dim, dim * dim, parts.shape[1], shares.shape[1], blocks,
        at_once, entries, **plain(x).options(),
    )  # fmt: skip
    return weight, side, mean, result


def cross_scatter(left: Side, right: Side, weights: Tensor, weighted: bool, total: Tensor) -> Tensor:
    """Σ w (x − x̄)(y − ȳ)ᵀ (H, D, E) fp64."""
    parts = products(left, right, weights, weighted)[0]
    heads, splits, dim, other = parts.shape
    result = parts.new_empty((heads, dim, other))
    blocks, at_once, entries = merge_blocks(splits, dim * other)
    merge_cross_kernel[(heads * blocks,)](
        parts, left.step, right.step, total, result, dim, other, dim * other, splits, blocks, at_once, entries,
        **plain(left.x).options(),
    )  # fmt: skip
    return result


def pair_weights(first: Tensor, second: Tensor, given: Tensor | None) -> Tensor:
    """The weight (H, P) fp64 of each pair of rows (H, P, D) and (H, P, E); 0 for one that is out."""
    (heads, num_pairs, dim), other = first.shape, second.shape[2]
    weights = first.new_empty((heads, num_pairs), dtype=torch.float64)
    tile = tuning.elementwise(tuning.target_of(first.device), dim)
    tiles = tuning.ceil_div(num_pairs, tile.rows)
    source = weights if given is None else given
    pair_weights_kernel[(heads * tiles,)](
        first, second, source, weights, num_pairs, dim, other, *first.stride()[:2], *second.stride()[:2],
        *source.stride(), tiles, given is not None, tile.rows, tile.dim, **tile.options(),
    )  # fmt: skip
    return weights


def covariance(x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, precision: str) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.moments`. ``x`` (H, N, D), ``y`` (H, N, E) or None, ``weights`` (H, max(N − lag, 0))."""
    first, second = pairs(unit_inner(x), None if y is None else unit_inner(y), lag)
    (heads, num_pairs, dim), other = first.shape, second.shape[2]
    computed = torch.float64 if precision == "exact" or x.dtype == torch.float64 else torch.float32
    if heads * num_pairs == 0:
        shapes = (), (dim,), (other,), (dim, dim), (dim, other), (other, other)
        return tuple(x.new_zeros((heads, *shape), dtype=torch.float64) for shape in shapes)
    with on_device(x):
        inside = total = None
        if weights is not None or other or plan(first, first, computed == torch.float64, True).tiles > 1:
            weight = pair_weights(first, second, weights)
            inside, total = weight.to(computed), weight.sum(1, keepdim=True)
        weight, left, mean_x, xx = scatter(first, inside, total, weights is not None, computed)
        if inside is None or other == 0:
            mean_y, xy, yy = (xx.new_empty((heads, *shape)) for shape in ((0,), (dim, 0), (0, 0)))
            return weight, mean_x, mean_y, xx, xy, yy
        _, right, mean_y, yy = scatter(second, inside, total, weights is not None, computed)
        return weight, mean_x, mean_y, xx, cross_scatter(left, right, inside, weights is not None, weight), yy
