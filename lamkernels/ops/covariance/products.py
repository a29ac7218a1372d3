"""Products of rows on the CPU: packed into panels, multiplied in registers, added up in fp64, merged in order.

A chunk of 64 rows is packed, less a shift near their mean, which differs a little from chunk to chunk. Tiles of
products are added up over the chunk in fp32 and go from there to fp64 partial sums, one set for each of a few parts of
the rows. Where one block of columns holds everything, a task packs what it multiplies; else the chunks of a slab of
rows are packed first and then multiplied, block by block. Rows a short lag later are packed once, with the earlier
ones. The partition is a function of the shape, so that the bits do not depend on the number of threads.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined,call-arg"
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.covariance.tiles import TILE, VECTORS, add_products, pack_panel, panel_width
from lamkernels.ops.nearest_code.numba import FLAGS, elements
from lamkernels.ops.parallel import compiled, empty, launch
from lamkernels.ops.simd import BITS, at, computed_type, fetch_add, prefetch, stored_type, view, words

DEPTH = 64  # rows of a chunk, whose products are added up in fp32
SHARED = 32  # the largest lag at which the later rows are packed with the earlier ones
BLOCK = 128  # columns of a block: the packed chunks and the sums of a pair of blocks stay in a 1 MiB cache
TASKS = 32  # that there are at least, where the rows suffice
SLAB_BYTES = 1 << 25  # of packed rows
APART = 16  # columns by which rows of sums are longer than they need be: a power of two would share cache sets
MERGED = 32  # rows of the result that a task merges, and columns that it mirrors at a time

# int64 parameters: the left rows at LEFT and the right ones at RIGHT,
LEFT, RIGHT = 2, 10
ADDRESS, STRIDE, DIM, SHIFT, UNIT, PACKED, SCALED, SUMS = range(8)
# and from 18 on: row numbers or 0, weights or 0, chunks (first row, rows, leading rows that are left ones only), the
# first chunk, chunks, rows of a packed panel, parts, partial sums (parts, D padded, E padded + APART) fp64 or 0 of left
# times right rows, the same of the upper triangle of left times left ones, how many rows later the right rows are among
# the packed left ones or 0, sides to pack, largest entries (slots,), whether a task packs its own, tasks
NUMBERS, WEIGHTS, TABLE, FIRST, CHUNKS, DEEP, PARTS, FULL, TRIANGLE, LAG, SIDES, MOST, FUSED, ALL = range(18, 32)

# column sums and, beside them, those times the dither: of the rows that are left ones only, left ones, both, right ones
KINDS = 4
DITHERS = 1021  # shifts in turn, from −510 to 510 units


@njit(**FLAGS)
def dither_of(chunk):
    """How many units the shift of a chunk is off: equal rows do not make equal products, which are rounded alike."""
    return chunk * 389 % DITHERS - DITHERS // 2


@njit(**FLAGS)
def _padded(dim, computed):
    """Columns in whole panels."""
    width = panel_width(computed)
    return (dim + width - 1) // width * width


@njit(**FLAGS)
def _pack_rows(a, side, kind, place, count, row, chunk, slot, packed, stored, computed):
    """Packs rows from ``place`` on as those from ``row`` on of the panels in ``packed`` [panels, DEEP, WIDTH]."""
    width, dim = panel_width(computed), a[side + DIM]
    padded = _padded(dim, computed)
    sums = a[side + SUMS] + 8 * (slot * KINDS + kind) * 2 * padded
    for column in range(0, dim, width):
        pack_panel(
            view(a[side + ADDRESS], column, stored), a[side + STRIDE], a[NUMBERS], a[WEIGHTS], place, count,
            dim - column, view(a[side + SHIFT], column, computed), view(a[side + UNIT], column, computed),
            computed + dither_of(chunk), a[side + SCALED] != 0, at(packed, column * a[DEEP] + row * width),
            sums + 8 * column, sums + 8 * (padded + column), view(a[MOST], slot, np.int64(0)),
        )  # fmt: skip


@njit(**FLAGS)
def _pack_chunk(a, chunk, slot, left, right, stored, computed):
    table = elements(a[TABLE], 3 * chunk, 3, np.int64(0))
    first, count, lead, lag = table[0], table[1], table[2], a[LAG]
    if lag == 0:
        _pack_rows(a, LEFT, 1, first, count, 0, chunk, slot, left, stored, computed)
        if a[SIDES] == 2:
            _pack_rows(a, RIGHT, 1, first, count, 0, chunk, slot, right, stored, computed)
        return
    early, late = min(lag, count), max(lag, count)
    _pack_rows(a, LEFT, 0 if lead > 0 else 1, first, early, 0, chunk, slot, left, stored, computed)
    if count > lag:
        _pack_rows(a, LEFT, 2, first + lag, count - lag, lag, chunk, slot, left, stored, computed)
    _pack_rows(a, LEFT, 3, first + late, count + lag - late, late, chunk, slot, left, stored, computed)


@njit(**FLAGS)
def _multiply_block(a, chunk, ahead, part, i_block, j_block, triangle, left, right, stored, computed):
    """Adds the products of a chunk in one block of columns to the partial sums of a part."""
    dim, width, deep = a[LEFT + DIM], panel_width(computed), a[DEEP]
    rows, columns = _padded(dim, computed), _padded(a[RIGHT + DIM], computed)
    stride = columns + APART
    table = elements(a[TABLE], 3 * chunk, 3, np.int64(0))
    skipped, later = (table[2], table[2]) if triangle else (0, a[LAG])
    depth = table[1] - skipped
    if depth == 0:
        return
    for j in range(j_block * BLOCK, min((j_block + 1) * BLOCK, columns), width):
        stop = min((i_block + 1) * BLOCK, dim)
        if triangle:
            stop = min(stop, j + width)
        start = i_block * BLOCK
        each = (DEPTH * TILE + stop - start - 1) // max(1, stop - start)
        for i in range(start, stop, TILE):
            if ahead >= 0 and j < dim:  # the rows of the next chunk, a few at a time while it multiplies
                place = ahead + (i - start) // TILE * each
                for n in range(place, place + each):
                    prefetch(view(a[LEFT + ADDRESS], n * a[LEFT + STRIDE] + j, stored))
            add_products(
                at(left, i // width * width * deep + i % width + skipped * width),
                at(right, j * deep + later * width), depth,
                view(a[TRIANGLE] if triangle else a[FULL], (part * rows + i) * stride + j, np.float64(0)), stride,
            )  # fmt: skip


@njit(**FLAGS)
def _packed(a, side, slot, computed):
    """The panels of one side of a chunk in the slab."""
    size = _padded(a[side + DIM], computed) * a[DEEP]
    return elements(a[side + PACKED], slot * size, size, computed)


@njit(**FLAGS)
def _pack_slab(p, stored, computed):
    a = carray(p, (ALL + 1,))
    while True:
        slot = fetch_add(a, 0)
        if slot >= a[CHUNKS]:
            return
        left, right = _packed(a, LEFT, slot, computed), _packed(a, RIGHT, slot, computed)
        _pack_chunk(a, a[FIRST] + slot, slot, left, right, stored, computed)


@njit(**FLAGS)
def _multiply_slab(p, stored, computed):
    a = carray(p, (ALL + 1,))
    sizes = [_padded(a[side + DIM], computed) * a[DEEP] if a[FUSED] != 0 else 0 for side in (LEFT, RIGHT)]
    own_left, own_right = np.full(sizes[0], computed), np.full(sizes[1] if a[SIDES] == 2 else 0, computed)
    across = (_padded(a[RIGHT + DIM], computed) + BLOCK - 1) // BLOCK
    upper = across * (across + 1) // 2 if a[TRIANGLE] != 0 else 0
    while True:
        task = fetch_add(a, 0)
        if task >= a[ALL]:
            return
        part, block = task % a[PARTS], task // a[PARTS]
        last = (part + 1) * a[CHUNKS] // a[PARTS]
        triangle = block < upper
        i_block, j_block = (block - upper) // across, (block - upper) % across
        if triangle:  # blocks of the upper triangle, row by row
            i_block, j_block = 0, block
            while j_block >= across - i_block:
                j_block -= across - i_block
                i_block += 1
            j_block += i_block
        for slot in range(part * a[CHUNKS] // a[PARTS], last):
            chunk, ahead = a[FIRST] + slot, -1
            if a[FUSED] == 0:
                left, right = _packed(a, LEFT, slot, computed), _packed(a, RIGHT, slot, computed)
                _multiply_block(a, chunk, -1, part, i_block, j_block, triangle, left, right, stored, computed)
                continue
            left, right = own_left, own_right if a[SIDES] == 2 else own_left
            _pack_chunk(a, chunk, part, left, right, stored, computed)
            if slot + 1 < last and a[NUMBERS] == 0:
                ahead = elements(a[TABLE], 3 * (chunk + 1), 1, np.int64(0))[0]
            if a[FULL] != 0:
                _multiply_block(a, chunk, ahead, part, 0, 0, False, left, right, stored, computed)
                ahead = -1
            if a[TRIANGLE] != 0:
                _multiply_block(a, chunk, ahead, part, 0, 0, True, left, right, stored, computed)


@njit(**FLAGS)
def _merge_parts(p):
    """Adds the parts in order and the outer products of vectors; mirrors the upper triangle where that is all.

    Parameters: 2 partial sums, 3 parts, 4 rows and 5 columns of them, 6 D, 7 E, 8 result, 9 symmetric, 10 tasks,
    11 and 12 vectors (R, D) and (R, E) fp64, 13 R.
    """
    a = carray(p, (14,))
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
                for r in range(a[13]):
                    factor = elements(a[11], r * dim + i, 1, np.float64(0))[0]
                    if factor != 0:
                        total += factor * elements(a[12], r * other + begin, stop - begin, np.float64(0))
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

    slab: int  # chunks that are packed at a time, all of them where a task packs its own
    parts: int  # sets of partial sums
    tasks: int  # of all parts
    fused: bool  # one block of columns holds everything, and a task packs its own chunks
    padded: tuple[int, int]  # D and E in whole panels


@functools.lru_cache(maxsize=1024)
def sizes_of(
    chunks: int, dim: int, other: int, triangle: bool, full: bool, deep: int, itemsize: int, two: bool
) -> Sizes:
    """The sizes for left rows (N, D) and right rows (N, E), ``itemsize`` bytes in the computed type.

    With ``two`` both sides are packed, else the left one serves as the right one too.
    """
    width = VECTORS * BITS // (8 * itemsize)
    padded = -(-dim // width) * width, -(-other // width) * width
    down, across = (-(-size // BLOCK) for size in padded)
    fused = down == across == 1
    blocks = 1 if fused else triangle * across * (across + 1) // 2 + full * down * across
    parts = max(1, min(chunks, -(-TASKS // blocks)))
    slab = max(1, SLAB_BYTES // (deep * (sum(padded) if two else padded[0]) * itemsize) // parts) * parts
    return Sizes(max(1, chunks if fused else min(slab, chunks)), parts, parts * blocks, fused, padded)


def computed_dtype(x: Tensor, exact: bool) -> torch.dtype:
    """What products of these rows are computed in."""
    return torch.float64 if exact or x.dtype == torch.float64 else torch.float32


class Shift(NamedTuple):
    """What is subtracted from rows: near their mean, (D,) fp64, and the unit of its dither, which is 0 for none."""

    near: Tensor
    unit: Tensor


class Rows(NamedTuple):
    """One factor of a product: rows (N, D) with unit inner stride, and their shift."""

    x: Tensor
    shift: Shift


class Sums(NamedTuple):
    """Weight, Σ w (x − shift) (D,) and Σ w (x − x̄)(y − ȳ)ᵀ (D, E), fp64."""

    weight: float
    step: Tensor
    products: Tensor


def chunks_of(rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(chunks, 3): first row, rows, 0."""
    first = np.arange(0, rows, DEPTH, dtype=np.int64)
    return np.stack([first, np.minimum(DEPTH, rows - first), np.zeros_like(first)], 1)


def runs_of(starts: Any, stops: Any, lag: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(chunks, 3) of runs of pairs: first row, pairs, and how many of their first rows are the second of no pair."""
    chunks = -(-(stops - starts) // DEPTH)
    within = np.arange(chunks.sum()) - np.repeat(chunks.cumsum() - chunks, chunks)
    first = np.repeat(starts, chunks) + within * DEPTH
    count = np.minimum(DEPTH, np.repeat(stops, chunks) - first)
    lead = np.where(within == 0, np.minimum(lag, count), 0)
    return np.ascontiguousarray(np.stack([first, count, lead], 1))


class Job:
    """Products of rows, one slab of chunks after another."""

    def __init__(
        self, left: Rows, right: Rows | None, table: Any, numbers: Tensor | None, weights: Tensor | None, exact: bool,
        *, triangle: bool, full: bool, lag: int = 0,
    ) -> None:  # fmt: skip
        """Runs everything; ``right`` is None for the left rows, with a ``lag`` for those so many rows later.

        Args:
            left: x.
            right: y.
            table: (chunks, 3) of :func:`chunks_of` or :func:`runs_of`.
            numbers: (N,) int64, the rows that are meant; None for all.
            weights: (N,) float64, at most 2, contiguous; None for ones.
            exact: compute in fp64 whatever x is.
            triangle: make Σ x xᵀ, without the rows that the table leaves out.
            full: make Σ x yᵀ.
            lag: 0, or at most SHARED.
        """
        x, computed, self.table, self.weights = left.x, computed_dtype(left.x, exact), table, weights
        scaling = weights is not None and not bool(((weights == 0) | (weights == 1)).all())
        sides = [left, left if right is None else right]
        (dim, other), deep = (side.x.shape[1] for side in sides), DEPTH + lag
        two = right is not None or scaling
        sizes = self.sizes = sizes_of(len(table), dim, other, triangle, full, deep, computed.itemsize, two)
        slots = sizes.parts if sizes.fused else sizes.slab
        packed = [empty((0 if sizes.fused else slots * deep * size,), computed) for size in sizes.padded]
        if not two:
            packed[1] = packed[0]
        self.shifts = [side.shift for side in sides]
        pads = [
            [torch.nn.functional.pad(part, (0, size - len(part))).to(computed) for part in side.shift]
            for side, size in zip(sides, sizes.padded, strict=True)
        ]
        self.sums = [torch.zeros((slots, KINDS, 2, size), dtype=torch.float64) for size in sizes.padded]
        down, across = sizes.padded
        shapes = ((sizes.parts * made, down, across + APART) for made in (triangle, full))
        self.triangle, self.full = (empty(shape, torch.float64).zero_() for shape in shapes)
        largest = torch.zeros(slots, dtype=torch.int64)
        kernels = (_pack, _multiply) if computed == torch.float32 else (_pack_exact, _multiply_exact)
        pack, multiply = (compiled(kernel, x.dtype) for kernel in kernels)
        parameters: list[int] = []
        for side, pad, buffer, scaled, sums in zip(sides, pads, packed, (scaling, False), self.sums, strict=True):
            parameters += [side.x.data_ptr(), side.x.stride(0), side.x.shape[1], *(part.data_ptr() for part in pad)]
            parameters += [buffer.data_ptr(), scaled, sums.data_ptr()]
        parameters += [0 if given is None else given.data_ptr() for given in (numbers, weights)]
        parameters.append(table.ctypes.data)
        made = [self.full.data_ptr() if full else 0, self.triangle.data_ptr() if triangle else 0]
        for first in range(0, len(table), sizes.slab):
            chunks = min(sizes.slab, len(table) - first)
            slab = [first, chunks, deep, sizes.parts, *made, lag, 1 + two, largest.data_ptr(), sizes.fused, sizes.tasks]
            work = chunks * DEPTH * dim * other
            if not sizes.fused:
                launch(pack, parameters + slab, chunks, work)
            launch(multiply, parameters + slab, sizes.tasks, work)
        bits = largest.max()
        entry = float(bits.view(torch.float64) if computed == torch.float64 else bits.int().view(torch.float32))
        self.largest = entry if entry < math.inf else math.inf  # not NaN, which no comparison finds
        with np.errstate(all="ignore"):  # NumPy's sum: torch's depends on the number of threads
            self.columns = [
                sums.numpy().sum(0)[..., : side.x.shape[1]] for sums, side in zip(self.sums, sides, strict=True)
            ]

    def results(
        self, kinds: Sequence[int], triangle: bool, right: int = 0, right_kinds: Sequence[int] = (),
        others: Tensor | None = None,
    ) -> Sums:  # fmt: skip
        """What was made of the left rows of some ``kinds`` and, unless ``triangle``, the rows of ``right``.

        With ``others`` (M, D) fp64, rows of weight 1 less ``near``, these are in as well.
        """
        weight, first, second = self._weights(triangle)
        unit, other_unit = self.shifts[0].unit, self.shifts[right].unit
        step, beside = self._sum(0, kinds)
        step = step + first * unit
        added = [] if others is None else list(others)
        for row in added:
            step, weight = step + row, weight + 1
        if triangle:
            other_step, other_beside = step, beside
        else:
            other_step, other_beside = self._sum(right, right_kinds)
            other_step = other_step + first * other_unit
        total = weight or 1.0
        lefts = torch.stack([beside + second * unit, unit, *added, -step / math.sqrt(total)])
        rights = torch.stack([other_unit, other_beside, *added, other_step / math.sqrt(total)])
        return Sums(weight, step, self._merged(triangle, lefts, rights))

    def _sum(self, side: int, kinds: Sequence[int]) -> Tensor:
        """(2, D): the column sums of rows of some kinds, and those times the dither."""
        with np.errstate(all="ignore"):
            return torch.from_numpy(self.columns[side][list(kinds)].sum(0))

    def _weights(self, triangle: bool) -> tuple[float, float, float]:
        """Σ w, Σ w j and Σ w j² for the dither j."""
        count = self.table[:, 1] - (self.table[:, 2] if triangle else 0)
        w = count.astype(np.float64)
        if self.weights is not None and len(count):
            w = np.add.reduceat(self.weights.numpy(), self.table[:, 0])
        j = (np.arange(len(count)) * 389 % DITHERS - DITHERS // 2).astype(np.float64)
        return float(w.sum()), float((w * j).sum()), float((w * j * j).sum())

    def _merged(self, triangle: bool, lefts: Tensor, rights: Tensor) -> Tensor:
        partial, sizes = self.triangle if triangle else self.full, self.sizes
        dim, other = lefts.shape[1], rights.shape[1]
        products = empty((dim, other), torch.float64)
        tasks = -(-dim // MERGED)
        merging = [partial.data_ptr(), *partial.shape, dim, other, products.data_ptr(), triangle, tasks]
        merging += [lefts.data_ptr(), rights.data_ptr(), len(lefts)]
        launch(compiled(_merge, torch.float64), merging, tasks, sizes.parts * dim * other)
        return products
