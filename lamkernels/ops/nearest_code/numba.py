"""nearest_code on the CPU: blocks of rows packed transposed, scored against tiles of codes by :mod:`simd`.

The fast path computes ½‖c−μ‖² − (x−μ)·(c−μ), less the least norm, in fp32 (fp64 for fp64 rows). Rows that it must not
decide, because an entry is not finite or so large that a product could overflow, are marked while they are packed and
scanned in fp64. ``precision="exact"`` keeps the second least score as well: where its distance from the least is more
than rounding can make, the fast path has found the minimum, and elsewhere the row is scanned in fp64.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.constants import COSINE_EPS
from lamkernels.ops.parallel import compiled, launch
from lamkernels.ops.simd import (
    BITS,
    TILE,
    VECTORS,
    at,
    computed_type,
    fetch_add,
    micro,
    micro_runner_up,
    pack,
    prefetch,
    stored_type,
    view,
    widen,
    words,
)

FLAGS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract"},  # not nnan or ninf: NaN and infinity have meanings here
}
# Bytes of packed rows in a block, where the codes fit in a panel and where they do not, and of the codes in a panel:
# together they stay in a 512 KiB cache.
BLOCK_BYTES, ROW_BYTES, PANEL_BYTES = 96 * 1024, 128 * 1024, 192 * 1024
SMALL_CODEBOOK = 1 << 13  # entries; sums of a larger one cost so much to merge that a task has more rows
LARGE_CHUNKS, LARGE_CHUNK = 8, 512
CHUNKS, MIN_CHUNK, MAX_CHUNK = 32, 256, 4096  # tasks, and rows in each: a function of the shape, never of the threads


class Codes(NamedTuple):
    """One codebook as :func:`prepare` leaves it, in the type the scores are computed in."""

    mean: Any  # [D]
    limit: Any  # [1], the square ‖x−μ‖² of a row from which on fp64 decides it
    radius: Any  # [1], max‖c−μ‖
    half_norm: Any  # [K padded]
    finite: Any  # [K padded], 1 or 0
    packed: Any  # [K padded / TILE, D, TILE]


@njit(**FLAGS)
def prepare(codebook, euclidean, codes):
    """Centres, negates and packs one codebook (K, D) into tiles [D, TILE].

    μ is the mean of the finite codes, each entry rounded to a multiple of 2^⌈log2 rms⌉ of its column: 0 for ordinary
    codebooks, dyadic for data with an offset, so that exact ties of integer data stay exact. It is 0 as well where the
    codes are not closer to it than to 0. Without ``euclidean``, μ and the norms are 0.
    """
    num_codes, dim = codebook.shape
    count = 0
    for k in range(codes.finite.shape[0]):
        check = np.nan
        if k < num_codes:
            check = 0.0
            for d in range(dim):
                check += codebook[k, d] * 0.0  # NaN from a NaN or an infinity
        codes.finite[k] = check == 0.0
        count += check == 0.0
    codes.mean[:] = 0.0
    if euclidean and count > 0:
        _rounded_mean(codebook, codes.finite, count, codes.mean)
    norms = np.full(codes.finite.shape[0], np.inf)
    largest, smallest_norm, largest_norm = 0.0, np.inf, 0.0
    for k in range(codes.finite.shape[0]):
        first = (k // TILE) * TILE * dim + k % TILE
        norm = 0.0
        for d in range(dim):
            entry = codebook[k, d] - codes.mean[d] if codes.finite[k] else codes.mean[d] * 0
            codes.packed[first + d * TILE] = -entry
            norm += np.float64(entry) * np.float64(entry)
            largest = max(largest, abs(np.float64(entry)))
        if codes.finite[k]:
            norms[k] = norm if euclidean else 0.0
            smallest_norm, largest_norm = min(smallest_norm, norms[k]), max(largest_norm, norm)
    for k in range(codes.finite.shape[0]):
        # relative to the least, in fp64: codes of nearly equal norm keep their difference
        codes.half_norm[k] = 0.5 * (norms[k] - smallest_norm) if codes.finite[k] else np.inf
    huge, tiny = (1e300, 1e-140) if codes.mean.itemsize == 8 else (1e37, 1e-15)
    codes.limit[0] = min(huge / (dim * max(largest, 1.0)), np.sqrt(huge)) ** 2
    if count == 0 or largest_norm > huge or 0.0 < largest < tiny:
        codes.limit[0] = 0.0  # no code, or norms that overflow or vanish: fp64 decides every row
    codes.radius[0] = np.sqrt(largest_norm)


@njit(**FLAGS)
def _rounded_mean(codebook, finite, count, mean):
    num_codes, dim = codebook.shape
    centre, square = np.zeros(dim, np.float64), np.zeros(dim, np.float64)
    for k in range(num_codes):
        if finite[k]:
            for d in range(dim):
                centre[d] += codebook[k, d]
    for d in range(dim):
        centre[d] /= count
    for k in range(num_codes):
        if finite[k]:
            for d in range(dim):
                square[d] += (codebook[k, d] - centre[d]) ** 2
    for d in range(dim):
        rms = np.sqrt(square[d] / count)
        if rms > 0.0 and rms < np.inf:
            unit = 2.0 ** np.ceil(np.log2(rms))
            mean[d] = np.rint(centre[d] / unit) * unit
        else:
            mean[d] = centre[d]
    if mean.any() and not _brings_closer(codebook, finite, mean):
        mean[:] = 0.0


@njit(**FLAGS)
def _brings_closer(codebook, finite, mean):
    """Whether the finite codes are closer to ``mean`` than to 0, in the geometric mean.

    Where most codes were thrown far out, the mean lies among them, and would cost the few that are left, and all the
    rows beside these, their digits. One factor is at least 1e-10, so that a code of zeros does not decide alone.
    """
    gain = 0.0
    for k in range(codebook.shape[0]):
        before, after = 0.0, 0.0
        for d in range(codebook.shape[1]):
            entry = np.float64(codebook[k, d])
            before += entry * entry
            after += (entry - mean[d]) ** 2
        if finite[k] and after > 0.0:
            gain += np.log(max(before / after, 1e-10))
        elif finite[k] and before > 0.0:
            return True  # a code that is the mean itself
    return gain > 0.0


@njit(**FLAGS)
def nearest_in_fp64(x, codebook, finite, euclidean):
    """The index of the nearest code of one row (D,) by fp64 differences; −1 if the row or every code is not finite."""
    num_codes, dim = codebook.shape
    check, zero = 0.0, not euclidean
    for d in range(dim):
        check += widen(x[d]) * 0.0
        zero = zero and widen(x[d]) == 0.0
    if check != 0.0:
        return -1
    best, index = np.inf, -1
    for k in range(num_codes):
        if finite[k]:
            if zero:
                return k  # every product is 0
            score = score_in_fp64(x, codebook[k], euclidean)
            if score < best or index < 0:
                best, index = score, k
    return index


@njit(**FLAGS)
def score_in_fp64(x, code, euclidean):
    """Σ(x − c)², or −x·c, of one row and one code."""
    score = 0.0
    if euclidean:
        for d in range(code.shape[0]):
            score += (np.float64(widen(x[d])) - np.float64(code[d])) ** 2
    else:
        for d in range(code.shape[0]):
            score -= np.float64(widen(x[d])) * np.float64(code[d])
    return score


@njit(**FLAGS)
def inverse_norm(row):
    """1 / ‖x‖, the norm clamped as for the cosine."""
    square = 0.0
    for d in range(row.shape[0]):
        square += np.float64(widen(row[d])) ** 2
    return 1.0 / max(np.sqrt(square), COSINE_EPS)


@njit(**FLAGS)
def scan(x, stride, codebook, codes, options, scratch, out):
    """Writes the nearest codes of the rows of a block to out, as many as that has.

    x: their elements; row n starts at n · stride. options: (euclidean, exact, panel). scratch: what
    :func:`make_scratch` makes.
    """
    euclidean, exact, panel = options
    packed, best, second, square, index, bad = scratch
    dim, width = codebook.shape[1], BITS // (8 * best.itemsize)
    rows, count = VECTORS * width, out.shape[0]
    tiles = (count + rows - 1) // rows
    # every tile is full: the last one begins among the rows of the one before, and a short block repeats its last row
    last = max(count - rows, 0)
    source, step = (x, stride) if count >= rows else (_repeated(x, stride, dim, count, rows), dim)
    best[: tiles * rows] = np.inf
    index[: tiles * rows] = 0
    if exact:
        second[: tiles * rows] = np.inf
    # where all codes are in one panel, a tile is scored as soon as it is packed, while the rows of the next are fetched
    fits = panel >= codes.finite.shape[0]
    for i in range(tiles):
        t = 0 if fits else i * rows * dim
        for r in range(VECTORS):
            lane = i * rows + r * width
            row = at(source, (min(i * rows, last) + r * width) * step)
            to = at(packed, t + r * width)
            pack(row, step, dim, at(codes.mean, 0), codes.limit[0], to, rows, at(bad, lane), at(square, lane))
        if fits:
            found = at(best, i * rows), at(index, i * rows), at(second, i * rows)
            ahead = x, (i + 1) * rows * stride, stride, rows, max(8, -(-rows * TILE // codes.finite.shape[0]))
            _score(at(packed, t), codes.packed, codes.half_norm, dim, 0, codes.finite.shape[0], exact, found, ahead)
    if not fits:
        for start in range(0, codes.finite.shape[0], panel):
            stop = min(start + panel, codes.finite.shape[0])
            for i in range(tiles):
                found = at(best, i * rows), at(index, i * rows), at(second, i * rows)
                ahead = x, 0, 0, 0, 0
                _score(at(packed, i * rows * dim), codes.packed, codes.half_norm, dim, start, stop, exact, found, ahead)
    if not euclidean:  # products that may underflow, in a score that nothing else is added to
        tiny = 1e-300 if best.itemsize == 8 else 1e-74
        for n in range(tiles * rows):
            bad[n] |= np.float64(square[n]) * np.float64(codes.radius[0]) ** 2 < tiny
    if exact:
        _mark_undecided(best, second, square, tiles * rows, dim, codes.radius[0], euclidean, bad)
    before, undecided = (tiles - 1) * rows, 0  # rows of the tiles before the last
    for n in range(before):
        out[n] = index[n]
        undecided |= bad[n]
    for n in range(before, count):
        out[n] = index[before + n - last]
        undecided |= bad[before + n - last]
    if undecided:
        for n in range(count):
            if bad[n if n < before else before + n - last]:
                out[n] = nearest_in_fp64(x[n * stride : n * stride + dim], codebook, codes.finite, euclidean)


@njit(**FLAGS)
def _repeated(x, stride, dim, count, rows):
    """Rows (count, D), ``stride`` elements apart, as a tile (rows, D) that ends in copies of the last one."""
    tile = np.empty(rows * dim, x.dtype)
    for n in range(rows):
        first = min(n, count - 1) * stride
        tile[n * dim : (n + 1) * dim] = x[first : first + dim]
    return tile


@njit(inline="always", **FLAGS)  # a call would pass its arguments through memory, for every tile
def _score(tile, packed_codes, half_norm, dim, start, stop, exact, found, ahead):
    """A packed tile of rows against the codes [start, stop), while the rows of the next tile are fetched.

    ahead: where these are, their stride, how many they are, and how many to fetch beside each tile of codes.
    """
    best, index, second = found
    x, first, stride, rows, count = ahead
    line = 64 // x.itemsize
    for k in range(start, stop, TILE):
        for n in range(k // TILE * count, min((k // TILE + 1) * count, rows)):
            for d in range(0, dim, line):
                prefetch(at(x, first + n * stride + d))
        if exact:
            micro_runner_up(tile, at(packed_codes, k * dim), at(half_norm, k), dim, k, best, index, second)
        else:
            micro(tile, at(packed_codes, k * dim), at(half_norm, k), dim, k, best, index)


@njit(**FLAGS)
def _mark_undecided(best, second, square, rows, dim, radius, euclidean, bad):
    """Marks the rows whose two least scores may be in the wrong order.

    With u half the machine epsilon, T = ‖x−μ‖ and C = max‖c−μ‖, a score is off by at most
    u·((D + 4)·T·C + 3·C²): T·C from rounding x−μ, one from c−μ, D from the chain of products, one from the last
    addition; C² from c−μ, and half of it from the norm and from the last addition; without norms and μ ("dot") none of
    these. Norms are summed in fp64, so that only for fp64 rows D/2·C² comes on top. 5 % cover the terms in u², the last
    term what underflows.
    """
    unit, norm_terms, tiny = (1.05 * 2.0**-53, dim + 3, 1e-307) if best.itemsize == 8 else (1.05 * 2.0**-24, 3, 1e-37)
    if not euclidean:
        norm_terms = 0
    radius = np.float64(radius)
    per_reach = 2 * unit * (dim + 4) * radius
    least = 2 * (unit * norm_terms * radius * radius + dim * tiny)
    for n in range(rows):
        gap = np.float64(second[n]) - np.float64(best[n])
        bad[n] |= not gap > per_reach * np.sqrt(np.float64(square[n])) + least  # NaN is undecided too


@njit(**FLAGS)
def make_scratch(block, dim, codes):
    """What :func:`scan` works in, one a thread: packed rows, least and second least score, ‖x−μ‖², index, bad."""
    dtype = codes.mean.dtype
    return (
        np.empty(block * dim, dtype),
        np.empty(block, dtype),
        np.empty(block, dtype),
        np.empty(block, dtype),
        np.empty(block, np.int32),
        np.empty(block, np.uint8),
    )


# Every kernel gets one array of int64. It begins with what the lookup needs, in the order of `lookup_parameters`;
# what an operator adds comes behind, from element LOOKUP on. `Strides` has 3 and 4, and 19 to 21.
LOOKUP = 22
DOT, L2, COSINE = 0, 1, 2  # element 12; the codes of a cosine are normalised already
METRICS = {"dot": DOT, "l2": L2, "cosine": COSINE}


@njit(**FLAGS)
def codes_of_head(a, head, computed):
    """The codebook (K, D) of a head and its prepared form, from the parameters."""
    num_codes, dim, padded = a[9], a[10], a[11]
    codebook = carray(view(a[5], head * a[6], computed), (num_codes, dim))
    size = dim + 2 + padded * (2 + dim)
    space = elements(a[7], head * size, size, computed)
    at_norm = dim + 2
    codes = Codes(
        space[:dim],
        space[dim : dim + 1],
        space[dim + 1 : at_norm],
        space[at_norm : at_norm + padded],
        space[at_norm + padded : at_norm + 2 * padded],
        space[at_norm + 2 * padded :],
    )
    return codebook, codes


@njit(**FLAGS)
def elements(address, offset, count, stored):
    """``count`` elements of the type of ``stored``, from ``offset`` elements past an address."""
    return carray(view(address, offset, stored), (count,))


@njit(**FLAGS)
def make_staging(a, rows, stored):
    """Room for so many rows of x, where :func:`rows_of_block` needs it."""
    return np.empty(rows * a[10] if a[19] != 0 else 0, elements(a[2], 0, 1, stored).dtype)


@njit(**FLAGS)
def rows_of_block(a, head, start, stop, staging, stored):
    """The rows [start, stop) of a head with entries side by side, in place or gathered, and the stride between them."""
    dim = a[10]
    if a[19] == 0:
        return elements(a[2], head * a[3] + start * a[4], (stop - start - 1) * a[4] + dim, stored), a[4]
    gather_rows(a, 19, head, start, stop, staging, stored)
    return staging, dim


@njit(**FLAGS)
def gather_rows(a, groups, head, start, stop, staging, stored):
    """The rows [start, stop) of a head, which lie in groups, into ``staging``; ``groups`` as for :func:`row_of`."""
    dim, row, size, group_stride, entry = a[10], a[4], a[groups], a[groups + 1], a[groups + 2]
    group, within, n = start // size, start % size, start
    while n < stop:
        count = min(size - within, stop - n)
        first = head * a[3] + group * group_stride + within * row
        source = elements(a[2], first, (count - 1) * row + (dim - 1) * entry + 1, stored)
        gathered = staging[(n - start) * dim : (n - start + count) * dim]
        for i in range(count):
            for d in range(dim):
                gathered[i * dim + d] = source[i * row + d * entry]
        group, within, n = group + 1, 0, n + count


@njit(**FLAGS)
def spread_rows(a, address, head, start, stop, rows, stored):
    """Writes the rows [start, stop) of a head to where those of a tensor laid out as x are, from their address on."""
    dim, row, size, group_stride, entry = a[10], a[4], a[19], a[20], a[21]
    group, within, n = start // size, start % size, start
    while n < stop:
        count = min(size - within, stop - n)
        first = head * a[3] + group * group_stride + within * row
        target = elements(address, first, (count - 1) * row + (dim - 1) * entry + 1, stored)
        spread = rows[(n - start) * dim : (n - start + count) * dim]
        for i in range(count):
            for d in range(dim):
                target[i * row + d * entry] = spread[i * dim + d]
        group, within, n = group + 1, 0, n + count


@njit(**FLAGS)
def row_of(a, groups, head, n, begin, count, staging, stored):
    """``count`` entries of row n of a head from ``begin`` on: in place, or gathered in ``staging``.

    ``groups`` says where in the parameters `Strides` goes on after 3 and 4.
    """
    if a[groups] == 0:
        return elements(a[2], head * a[3] + n * a[4] + begin, count, stored)
    at_row = head * a[3] + n // a[groups] * a[groups + 1] + n % a[groups] * a[4]
    source = elements(a[2], at_row + begin * a[groups + 2], (count - 1) * a[groups + 2] + 1, stored)
    for d in range(count):
        staging[d] = source[d * a[groups + 2]]
    return staging


@njit(**FLAGS)
def prepare_heads(p, computed):
    """Prepares the codebook of each head; see :func:`prepare`."""
    a = carray(p, (LOOKUP,))
    while True:
        head = fetch_add(a, 0)
        if head >= a[18]:
            return
        codebook, codes = codes_of_head(a, head, computed)
        prepare(codebook, a[12] == L2, codes)


@njit(**FLAGS)
def _nearest_chunks(p, stored, computed):
    a = carray(p, (LOOKUP + 2,))
    rows, dim, chunk, block = a[8], a[10], a[15], a[16]
    chunks = (rows + chunk - 1) // chunk
    _, codes = codes_of_head(a, 0, computed)
    scratch, staging = make_scratch(block, dim, codes), make_staging(a, block, stored)
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[18]:
            return
        head, first = task // chunks, task % chunks * chunk
        codebook, codes = codes_of_head(a, head, computed)
        options = a[12] == L2, a[13] != 0, a[14]
        for start in range(first, min(first + chunk, rows), block):
            stop = min(start + block, first + chunk, rows)
            x, stride = rows_of_block(a, head, start, stop, staging, stored)
            out = elements(a[17], head * rows + start, stop - start, np.int64(0))
            scan(x, stride, codebook, codes, options, scratch, out)
            if a[LOOKUP] != 0:
                distance = elements(a[LOOKUP], head * rows + start, stop - start, computed)
                for n in range(stop - start):
                    distance[n] = np.nan
                    if out[n] >= 0:
                        row = x[n * stride : n * stride + dim]
                        score = score_in_fp64(row, codebook[out[n]], options[0])
                        distance[n] = score if a[12] == L2 else -score
                        if a[12] == COSINE:
                            distance[n] *= inverse_norm(row)


def _prepare(p):
    prepare_heads(words(p), computed_type(p))


def _nearest(p):
    _nearest_chunks(words(p), stored_type(p), computed_type(p))


class Sizes(NamedTuple):
    """How a lookup is cut up, by its shape alone: the results do not depend on the number of threads."""

    padded: int  # codes, a multiple of TILE
    panel: int  # codes that stay in the cache
    chunk: int  # rows of a task
    block: int  # rows that are packed at a time
    chunks: int  # tasks of a head
    workspace: int  # entries of the prepared codebook of a head


@functools.lru_cache(maxsize=1024)
def sizes_of(rows: int, num_codes: int, dim: int, itemsize: int, summing: bool = False) -> Sizes:
    """The sizes for rows (N, D) and codes (K, D), ``itemsize`` bytes in the computed type.

    ``summing``: every chunk has sums of its own, so that few chunks are best where the codebook is large.
    """
    padded = num_codes + -num_codes % TILE
    tile_rows = VECTORS * (BITS // (8 * itemsize))
    panel = max(TILE, PANEL_BYTES // (dim * itemsize) // TILE * TILE)
    chunk = min(max(-(-rows // CHUNKS), MIN_CHUNK), MAX_CHUNK)
    if summing and num_codes * dim > SMALL_CODEBOOK:
        chunk = min(max(-(-rows // LARGE_CHUNKS), LARGE_CHUNK), MAX_CHUNK)
    chunk += -chunk % tile_rows
    # where the codes do not fit in a panel, more rows share each
    block_bytes = BLOCK_BYTES if panel >= padded else ROW_BYTES
    block = min(chunk, max(1, block_bytes // (dim * itemsize * tile_rows)) * tile_rows)
    return Sizes(padded, panel, chunk, block, -(-rows // chunk), dim + 2 + padded * (2 + dim))


class Lookup(NamedTuple):
    """The parameters of a lookup. The tensors are held because the parameters point at them."""

    parameters: list[int]
    tasks: int
    work: int
    tensors: tuple[Tensor, ...]


def prepare_lookup(
    x: Tensor, codebook: Tensor, metric: str, precision: str, out: Tensor, summing: bool = False
) -> Lookup:
    """Lays out the parameters, as :func:`lay_out_lookup` does, and prepares the codebook of every head."""
    lookup = lay_out_lookup(x, codebook, metric, precision, out, summing)
    heads = codebook.shape[0]
    launch(compiled(_prepare, lookup.tensors[1].dtype), lookup.parameters, heads, codebook.numel())
    return lookup


def lay_out_lookup(x: Tensor, codebook: Tensor, metric: str, precision: str, out: Tensor, summing: bool) -> Lookup:
    """Lays out the parameters and allocates the space of the prepared codebooks.

    Args:
        x: (H, N, D), or (H, B, N / B, D) where the rows lie in groups.
        codebook: (H, K, D).
        metric: "l2", "dot", or "cosine" with normalised codes.
        precision: "exact" scans the rows that fp32 cannot decide in fp64; "fast" is "default" here.
        out: (H, N) int64, contiguous: where the indices go.
        summing: as for :func:`sizes_of`.
    """
    (heads, rows), (num_codes, dim) = out.shape, codebook.shape[1:]
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    codebook = codebook.to(computed)
    if codebook.stride()[1:] != (dim, 1):
        codebook = codebook.contiguous()
    sizes = sizes_of(rows, num_codes, dim, computed.itemsize, summing)
    workspace = torch.empty(heads, sizes.workspace, dtype=computed, device="cpu")
    parameters = lookup_parameters(
        x.data_ptr(), row_strides(x), (codebook.data_ptr(), codebook.stride(0)), workspace.data_ptr(),
        (rows, num_codes, dim), sizes, METRICS[metric], precision, out.data_ptr(), heads,
    )  # fmt: skip
    work = heads * rows * sizes.padded * dim
    return Lookup(parameters, heads * sizes.chunks, work, (x, codebook, workspace))


class Strides(NamedTuple):
    """Where the rows of x are, in elements."""

    head: int
    row: int
    group: int = 0  # rows in a group; 0 where `row` says all and entries are side by side
    group_stride: int = 0
    entry: int = 1


def row_strides(x: Tensor) -> Strides:
    """Of x (H, N, D), or (H, B, N / B, D)."""
    if x.ndim == 3 and x.stride(2) == 1:
        return Strides(x.stride(0), x.stride(1))
    if x.ndim == 3:
        x = x.unsqueeze(1)
    return Strides(x.stride(0), x.stride(2), max(x.shape[2], 1), x.stride(1), x.stride(3))


def lookup_parameters(
    x: int, strides: Strides, codebook: tuple[int, int], workspace: int, shape: tuple[int, int, int], sizes: Sizes,
    metric: int, precision: str, out: int, heads: int,
) -> list[int]:  # fmt: skip
    """Elements 2 to LOOKUP − 1 of a kernel's array, from addresses, strides in elements and sizes."""
    rows, num_codes, dim = shape
    return [
        x, strides.head, strides.row, *codebook, workspace, rows, num_codes, dim, sizes.padded, metric,
        precision == "exact", sizes.panel, sizes.chunk, sizes.block, out, heads, strides.group, strides.group_stride,
        strides.entry,
    ]  # fmt: skip


def nearest_code(
    x: Tensor, codebook: Tensor, metric: str, precision: str, return_distance: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.nearest_code`. ``x`` (H, N, D) or (H, B, N / B, D), ``codebook`` (H, K, D)."""
    heads, rows = x.shape[0], x.shape[1:-1].numel()
    indices = torch.empty((heads, rows), dtype=torch.int64, device="cpu")
    distance_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    distance = torch.empty((heads, rows if return_distance else 0), dtype=distance_dtype, device="cpu")
    lookup = prepare_lookup(x, codebook, metric, precision, indices)
    parameters = [*lookup.parameters, distance.data_ptr() if return_distance else 0, 0]
    launch(compiled(_nearest, x.dtype), parameters, lookup.tasks, lookup.work)
    return indices, distance
