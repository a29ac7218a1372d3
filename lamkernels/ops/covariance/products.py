"""Products of rows on the CPU: packed into panels, multiplied in registers, added up in fp64, merged in order.

A chunk of 64 rows is packed, less a shift near their mean. Tiles of products are added up over the chunk in fp32 and go
from there to fp64 partial sums, one set for each of a few parts of the rows. Where one block of columns holds
everything, a task packs what it multiplies; else the chunks of a slab of rows are packed first and then multiplied,
block by block. The partition is a function of the shape, so that the bits do not depend on the number of threads.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined,call-arg"
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.covariance.tiles import TILE, VECTORS, add_products, pack_panel, panel_width
from lamkernels.ops.nearest_code.numba import FLAGS, elements
from lamkernels.ops.parallel import compiled, launch
from lamkernels.ops.simd import BITS, at, computed_type, fetch_add, stored_type, view, words

DEPTH = 64  # rows of a chunk, whose products are added up in fp32
BLOCK = 128  # columns of a block: the packed chunks and the sums of a pair of blocks stay in a 1 MiB cache
TASKS = 32  # that there are at least, where the rows suffice
SLAB_BYTES = 1 << 23  # of packed rows
MERGED = 32  # rows of the result that a task merges, and columns that it mirrors at a time

# int64 parameters: the left rows at LEFT and the right ones at RIGHT,
LEFT, RIGHT = 2, 8
ADDRESS, STRIDE, DIM, SHIFT, PACKED, SCALED = range(6)
# and from 14 on: row numbers or 0, weights or 0, how many rows, the first chunk, chunks, parts, partial sums (parts, D
# padded, E padded) fp64, whether there is the upper triangle alone, sides to pack (1 where the left panels are the
# right ones), column sums (slots, D padded) fp64, largest entries (slots,), whether a task packs its own, tasks
NUMBERS, WEIGHTS, ROWS, FIRST, CHUNKS, PARTS, PARTIAL, SYMMETRIC, SIDES, SUMS, MOST, FUSED, ALL = range(14, 27)


@njit(**FLAGS)
def _padded(dim, computed):
    """Columns in whole panels."""
    width = panel_width(computed)
    return (dim + width - 1) // width * width


@njit(**FLAGS)
def _pack_chunk(a, side, chunk, slot, packed, stored, computed):
    """Packs a chunk of the rows of one side into ``packed`` [panels, DEPTH, WIDTH]."""
    width, dim, first = panel_width(computed), a[side + DIM], chunk * DEPTH
    count, padded = min(DEPTH, a[ROWS] - first), _padded(a[side + DIM], computed)
    for column in range(0, dim, width):
        sums = a[SUMS] + 8 * (slot * padded + column) if side == LEFT else 0
        pack_panel(
            view(a[side + ADDRESS], column, stored), a[side + STRIDE], a[NUMBERS], a[WEIGHTS], first, count,
            dim - column, view(a[side + SHIFT], column, computed), a[side + SCALED] != 0, at(packed, column * DEPTH),
            sums, view(a[MOST], slot, np.int64(0)),
        )  # fmt: skip


@njit(**FLAGS)
def _multiply_chunk(a, chunk, part, block, left, right, computed):
    """Adds the products of a chunk in one block of columns to the partial sums of a part."""
    dim, width, count = a[LEFT + DIM], panel_width(computed), min(DEPTH, a[ROWS] - chunk * DEPTH)
    rows, columns = _padded(dim, computed), _padded(a[RIGHT + DIM], computed)
    across = (columns + BLOCK - 1) // BLOCK
    i_block, j_block = block // across, block % across
    if a[SYMMETRIC] != 0:  # blocks of the upper triangle, row by row
        i_block, j_block = 0, block
        while j_block >= across - i_block:
            j_block -= across - i_block
            i_block += 1
        j_block += i_block
    for j in range(j_block * BLOCK, min((j_block + 1) * BLOCK, columns), width):
        for i in range(i_block * BLOCK, min((i_block + 1) * BLOCK, dim), TILE):
            if a[SYMMETRIC] != 0 and j + width <= i:
                break
            add_products(
                at(left, i // width * width * DEPTH + i % width), at(right, j * DEPTH), count,
                view(a[PARTIAL], (part * rows + i) * columns + j, np.float64(0)), columns,
            )  # fmt: skip


@njit(**FLAGS)
def _packed(a, side, slot, computed):
    """The panels of one side of a chunk in the slab."""
    size = _padded(a[side + DIM], computed) * DEPTH
    return elements(a[side + PACKED], slot * size, size, computed)


@njit(**FLAGS)
def _pack_slab(p, stored, computed):
    a = carray(p, (ALL + 1,))
    while True:
        slot = fetch_add(a, 0)
        if slot >= a[CHUNKS]:
            return
        _pack_chunk(a, LEFT, a[FIRST] + slot, slot, _packed(a, LEFT, slot, computed), stored, computed)
        if a[SIDES] == 2:
            _pack_chunk(a, RIGHT, a[FIRST] + slot, slot, _packed(a, RIGHT, slot, computed), stored, computed)


@njit(**FLAGS)
def _multiply_slab(p, stored, computed):
    a = carray(p, (ALL + 1,))
    size = BLOCK * DEPTH if a[FUSED] != 0 else 0
    own_left, own_right = np.full(size, computed), np.full(size if a[SIDES] == 2 else 0, computed)
    while True:
        task = fetch_add(a, 0)
        if task >= a[ALL]:
            return
        part, block = task % a[PARTS], task // a[PARTS]
        for slot in range(part * a[CHUNKS] // a[PARTS], (part + 1) * a[CHUNKS] // a[PARTS]):
            chunk = a[FIRST] + slot
            if a[FUSED] != 0:
                left, right = own_left, own_left
                _pack_chunk(a, LEFT, chunk, part, left, stored, computed)
                if a[SIDES] == 2:
                    right = own_right
                    _pack_chunk(a, RIGHT, chunk, part, right, stored, computed)
            else:
                left, right = _packed(a, LEFT, slot, computed), _packed(a, RIGHT, slot, computed)
            _multiply_chunk(a, chunk, part, block, left, right, computed)


@njit(**FLAGS)
def _merge_parts(p):
    """Adds the parts in order, less the outer product of two vectors; mirrors the upper triangle where that is all.

    Parameters: 2 partial sums, 3 parts, 4 rows and 5 columns of them, 6 D, 7 E, 8 result, 9 symmetric, 10 tasks,
    11 and 12 vectors (D,) and (E,) fp64.
    """
    a = carray(p, (13,))
    parts, rows, columns, dim, other = a[3], a[4], a[5], a[6], a[7]
    while True:
        task = fetch_add(a, 0)
        if task >= a[10]:
            return
        first, last = task * MERGED, min((task + 1) * MERGED, dim)
        for start in range(first if a[9] != 0 else 0, other, MERGED):
            stop = min(start + MERGED, other)
            for i in range(first, last):
                begin = max(start, i) if a[9] != 0 else start
                total = elements(a[8], i * other + begin, stop - begin, np.float64(0))
                total[:] = elements(a[2], i * columns + begin, stop - begin, np.float64(0))
                for part in range(1, parts):
                    total += elements(a[2], (part * rows + i) * columns + begin, stop - begin, np.float64(0))
                total -= elements(a[11], i, 1, np.float64(0))[0] * elements(a[12], begin, stop - begin, np.float64(0))
            if a[9] != 0:
                for j in range(start, stop):
                    for i in range(first, min(last, j)):
                        mirrored = elements(a[8], j * other + i, 1, np.float64(0))
                        mirrored[0] = elements(a[8], i * other + j, 1, np.float64(0))[0]


def _pack(p):
    _pack_slab(words(p), stored_type(p), computed_type(p))


def _pack_exact(p):
    _pack_slab(words(p), stored_type(p), np.float64(0))


def _multiply(p):
    _multiply_slab(words(p), stored_type(p), computed_type(p))


def _multiply_exact(p):
    _multiply_slab(words(p), stored_type(p), np.float64(0))


def _merge(p):
    _merge_parts(words(p))


class Sizes(NamedTuple):
    """How products are cut up, by their shape alone: the bits do not depend on the number of threads."""

    chunks: int
    slab: int  # chunks that are packed at a time, all of them where a task packs its own
    parts: int  # sets of partial sums
    blocks: int  # of columns, tasks of a part
    padded: tuple[int, int]  # D and E in whole panels


@functools.lru_cache(maxsize=1024)
def sizes_of(rows: int, dim: int, other: int, symmetric: bool, itemsize: int) -> Sizes:
    """The sizes for left rows (N, D) and right rows (N, E), ``itemsize`` bytes in the computed type."""
    width = VECTORS * BITS // (8 * itemsize)
    padded = -(-dim // width) * width, -(-other // width) * width
    chunks = -(-rows // DEPTH)
    down, across = (-(-size // BLOCK) for size in padded)
    blocks = across * (across + 1) // 2 if symmetric else down * across
    parts = max(1, min(chunks, -(-TASKS // blocks)))
    slab = max(1, SLAB_BYTES // (DEPTH * sum(padded) * itemsize) // parts) * parts
    return Sizes(chunks, max(1, chunks if blocks == 1 else min(slab, chunks)), parts, blocks, padded)


def computed_dtype(x: Tensor, exact: bool) -> torch.dtype:
    """What products of these rows are computed in."""
    return torch.float64 if exact or x.dtype == torch.float64 else torch.float32


class Rows(NamedTuple):
    """One factor of a product: rows (N, D) with unit inner stride, and a shift (D,) fp64, their mean or near it."""

    x: Tensor
    shift: Tensor
    mean: Tensor | None = None


def add_up(
    left: Rows, right: Rows | None, weight: float, numbers: Tensor | None, weights: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor, float]:
    """Σ w (x − x̄)(y − ȳ)ᵀ over the rows whose weight is positive, by products of x − shift and y − shift.

    Args:
        left: x; its mean is computed where there is no ``right``.
        right: y, or None for x.
        weight: Σ w.
        numbers: (N,) int64, the rows that are meant; None for all.
        weights: (N,) float64, at most 2, contiguous; None for ones.
        exact: compute in fp64 whatever x is.

    Returns:
        (D, E) fp64, x̄ − shift (D,) fp64, and the largest |x − shift|, infinity where a row is not finite.
    """
    symmetric, x, computed = right is None, left.x, computed_dtype(left.x, exact)
    scaling = weights is not None and not bool(((weights == 0) | (weights == 1)).all())
    sides = [left, left if right is None else right]
    dim, other = (side.x.shape[1] for side in sides)
    rows = x.shape[0] if numbers is None else numbers.shape[0]
    sizes = sizes_of(rows, dim, other, symmetric, computed.itemsize)
    fused = sizes.blocks == 1
    slots = sizes.parts if fused else sizes.slab
    packed = [torch.empty(0 if fused else slots * DEPTH * size, dtype=computed) for size in sizes.padded]
    if symmetric and not scaling:
        packed[1] = packed[0]
    shifts = [
        torch.nn.functional.pad(side.shift, (0, size - side.x.shape[1])).to(computed)
        for side, size in zip(sides, sizes.padded, strict=True)
    ]
    partial = torch.zeros((sizes.parts, *sizes.padded), dtype=torch.float64)
    sums = torch.zeros((slots, sizes.padded[0]), dtype=torch.float64)
    largest = torch.zeros(slots, dtype=torch.int64)
    tasks = sizes.parts * sizes.blocks
    kernels = (_pack, _multiply) if computed == torch.float32 else (_pack_exact, _multiply_exact)
    pack, multiply = (compiled(kernel, x.dtype) for kernel in kernels)
    parameters: list[int] = []
    for side, shift, buffer, scaled in zip(sides, shifts, packed, (scaling, False), strict=True):
        parameters += [side.x.data_ptr(), side.x.stride(0), side.x.shape[1]]
        parameters += [shift.data_ptr(), buffer.data_ptr(), scaled]
    parameters += [0 if given is None else given.data_ptr() for given in (numbers, weights)]
    for first in range(0, sizes.chunks, sizes.slab):
        chunks = min(sizes.slab, sizes.chunks - first)
        slab = [rows, first, chunks, sizes.parts, partial.data_ptr(), symmetric, 1 if packed[0] is packed[1] else 2]
        slab += [sums.data_ptr(), largest.data_ptr(), fused, tasks]
        work = chunks * DEPTH * dim * other
        if not fused:
            launch(pack, parameters + slab, chunks, work)
        launch(multiply, parameters + slab, tasks, work)
    total = torch.zeros(sizes.padded[0], dtype=torch.float64)
    for part in sums:  # in order
        total += part
    step = total[:dim] / (weight or 1.0)
    vectors = [math.sqrt(weight) * step] * 2
    if right is not None and left.mean is not None and right.mean is not None:
        vectors = [weight * (left.mean - left.shift), right.mean - right.shift]
    in_place = sizes.parts == 1 and sizes.padded == (dim, other)
    products = partial[0] if in_place else torch.empty((dim, other), dtype=torch.float64)
    tasks = -(-dim // MERGED)
    merging = [partial.data_ptr(), sizes.parts, *sizes.padded, dim, other, products.data_ptr(), symmetric, tasks]
    merging += [vector.data_ptr() for vector in vectors]
    launch(compiled(_merge, torch.float64), merging, tasks, sizes.parts * dim * other)
    bits = largest.max()
    entry = float(bits.view(torch.float64) if computed == torch.float64 else bits.int().view(torch.float32))
    return products, step, entry if entry < math.inf else math.inf  # not NaN, which no comparison finds
