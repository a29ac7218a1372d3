"""code_statistics on the CPU: sums in fp64, in the order of the rows, whatever the number of threads.

Of a small codebook a task owns a slice of columns of a chunk of rows, and the sums of the chunks are merged in order.
Of a large one it owns a slice of columns of a range of codes: it lists the rows of each, and sums one code at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.nearest_code.numba import FLAGS, elements, row_of, row_strides
from lamkernels.ops.parallel import compiled, empty, launch
from lamkernels.ops.simd import computed_type, fetch_add, stored_type, widen, words

SLICE = 16  # columns: a cache line of fp32
CHUNKS = 8
MAX_CHUNKED = 1 << 15  # entries of a codebook up to which every chunk of rows has sums of its own
WIDE_SLICE, TASKS = 256, 32  # columns, and tasks of a head, of a larger one: every task reads all indices

# int64 parameters: 2 x, 3 head stride, 4 row stride, 5 codebook or 0, 6 its head stride, 7 partial sums (H, P, K, D)
# fp64, 8 N, 9 K, 10 D, 11 partial counts (H, P, K), 12 indices (H, N), 13 P, the chunks or the ranges of codes, 14
# slices, 15 counts, 16 sums, 17 residual sums or 0, 18 tasks, 19 H, 20 to 22 groups of rows of x, as 19 to 21 of the
# lookup
PARAMETERS = 23


@njit(**FLAGS)
def _partial_sums(p, stored, computed):
    a = carray(p, (PARAMETERS,))
    rows, num_codes, dim, chunks, slices = a[8], a[9], a[10], a[13], a[14]
    size = (a[8] + a[13] - 1) // max(a[13], 1)
    staging = np.empty(SLICE, elements(a[2], 0, 1, stored).dtype)
    while True:
        task = fetch_add(a, 0)
        if task >= a[18]:
            return
        part, begin = task // slices, task % slices * SLICE
        head, chunk = part // chunks, part % chunks
        indices = elements(a[12], head * rows, rows, np.int64(0))
        end, first, stop = min(begin + SLICE, dim), min(chunk * size, rows), min((chunk + 1) * size, rows)
        width = end - begin
        for k in range(num_codes):
            elements(a[7], (part * num_codes + k) * dim + begin, width, np.float64(0))[:] = 0.0
        for n in range(first, stop):
            k = indices[n]
            if k >= 0:
                # arrays of their own, whose indices the compiler knows not to be negative: the loops are vectorised
                row = row_of(a, 20, head, n, begin, width, staging, stored)
                sums = elements(a[7], (part * num_codes + k) * dim + begin, width, np.float64(0))
                if a[5] == 0:
                    for d in range(width):
                        sums[d] += widen(row[d])
                else:
                    code = elements(a[5], head * a[6] + k * dim + begin, width, computed)
                    for d in range(width):
                        sums[d] += np.float64(widen(row[d])) - np.float64(code[d])
        if begin == 0:
            counts = elements(a[11], part * num_codes, num_codes, np.int64(0))
            counts[:] = 0
            for n in range(first, stop):
                if indices[n] >= 0:
                    counts[indices[n]] += 1
        if fetch_add(a, 1) == a[18] - 1:
            for h in range(a[19]):
                _merge(a, h, computed)


@njit(**FLAGS)
def _merge(a, head, computed):
    """Adds the chunks of a head in order; with a codebook the sums were residual: Σx = n·c + Σ(x − c)."""
    num_codes, dim, chunks = a[9], a[10], a[13]
    size = num_codes * dim
    total = elements(a[7], head * chunks * size, size, np.float64(0))
    count = elements(a[11], head * chunks * num_codes, num_codes, np.int64(0))
    for chunk in range(1, chunks):
        total += elements(a[7], (head * chunks + chunk) * size, size, np.float64(0))
        count += elements(a[11], (head * chunks + chunk) * num_codes, num_codes, np.int64(0))
    elements(a[15], head * num_codes, num_codes, np.int64(0))[:] = count
    sums = elements(a[16], head * size, size, computed)
    if a[5] == 0:
        sums[:] = total
    else:
        elements(a[17], head * size, size, computed)[:] = total
        codes = elements(a[5], head * a[6], size, computed)
        for k in range(num_codes):
            for d in range(k * dim, (k + 1) * dim):
                sums[d] = total[d] + np.float64(count[k]) * codes[d] if count[k] > 0 else 0.0


@njit(**FLAGS)
def _sums_of_codes(p, stored, computed):
    a = carray(p, (PARAMETERS,))
    rows, num_codes, dim, ranges, slices = a[8], a[9], a[10], a[13], a[14]
    size = (num_codes + ranges - 1) // ranges
    staging = np.empty(WIDE_SLICE, elements(a[2], 0, 1, stored).dtype)
    total, code = np.empty(WIDE_SLICE, np.float64), np.zeros(WIDE_SLICE, np.float64)
    while True:
        task = fetch_add(a, 0)
        if task >= a[18]:
            return
        part, begin = task // slices, task % slices * WIDE_SLICE
        head, first = part // ranges, min(part % ranges * size, num_codes)
        width, codes = min(begin + WIDE_SLICE, dim) - begin, min(size, num_codes - first)
        ends, order = _rows_by_code(elements(a[12], head * rows, rows, np.int64(0)), first, codes)
        if begin == 0:
            counts = elements(a[15], head * num_codes + first, codes, np.int64(0))
            for k in range(codes):
                counts[k] = ends[k + 1] - ends[k]
        for k in range(codes):
            place = (head * num_codes + first + k) * dim + begin
            if a[5] != 0:
                code[:width] = elements(a[5], head * a[6] + (first + k) * dim + begin, width, computed)
            total[:] = 0.0
            for i in range(ends[k], ends[k + 1]):
                row = row_of(a, 20, head, order[i], begin, width, staging, stored)
                for d in range(width):
                    total[d] += np.float64(widen(row[d])) - code[d]
            sums = elements(a[16], place, width, computed)
            count = np.float64(ends[k + 1] - ends[k])  # Σx = n·c + Σ(x − c)
            for d in range(width):
                sums[d] = total[d] + count * code[d] if count > 0 else 0.0
            if a[17] != 0:
                elements(a[17], place, width, computed)[:] = total[:width]


@njit(**FLAGS)
def _rows_by_code(indices, first, codes):
    """The rows of the codes [first, first + codes), in order: those of the k-th are order[ends[k] : ends[k + 1]]."""
    ends = np.zeros(codes + 1, np.int64)
    for n in range(indices.shape[0]):
        if first <= indices[n] < first + codes:
            ends[indices[n] - first + 1] += 1
    for k in range(codes):
        ends[k + 1] += ends[k]
    order, place = np.empty(ends[codes], np.int64), ends.copy()
    for n in range(indices.shape[0]):
        if first <= indices[n] < first + codes:
            k = indices[n] - first
            order[place[k]] = n
            place[k] += 1
    return ends, order


@njit(**FLAGS)
def _countable_rows(p, stored):
    """Copies the indices at 7 to those at 12, −1 where one is out of range or its row not finite."""
    a = carray(p, (PARAMETERS,))
    rows, dim, size = a[8], a[10], (a[8] + CHUNKS - 1) // CHUNKS
    staging = np.empty(dim, elements(a[2], 0, 1, stored).dtype)
    while True:
        task = fetch_add(a, 0)
        if task >= a[19] * CHUNKS:
            return
        head, chunk = task // CHUNKS, task % CHUNKS
        given = elements(a[7], head * rows, rows, np.int64(0))
        indices = elements(a[12], head * rows, rows, np.int64(0))
        for n in range(min(chunk * size, rows), min((chunk + 1) * size, rows)):
            check = 0.0
            row = row_of(a, 20, head, n, 0, dim, staging, stored)
            for d in range(dim):
                check += widen(row[d]) * 0.0
            indices[n] = given[n] if check == 0.0 and 0 <= given[n] < a[9] else -1


def _sums(p):
    _partial_sums(words(p), stored_type(p), computed_type(p))


def _large_sums(p):
    _sums_of_codes(words(p), stored_type(p), computed_type(p))


def _countable(p):
    _countable_rows(words(p), stored_type(p))


def sum_rows(
    x: Tensor, indices: Tensor, codebook: Tensor | None, counts: Tensor, sums: Tensor, residual_sums: Tensor | None
) -> None:
    """Fills counts and sums, and with a codebook in the computed type residual_sums, from checked indices.

    Args:
        x: (H, N, D) or (H, B, N / B, D).
        indices: (H, N) int64, contiguous, −1 or below K.
        codebook: (H, K, D), rows contiguous, or None.
        counts: (H, K) int64.
        sums: (H, K, D).
        residual_sums: (H, K, D), with a codebook.
    """
    (heads, rows), (num_codes, dim), strides = indices.shape, sums.shape[1:], row_strides(x)
    chunked = num_codes * dim <= MAX_CHUNKED
    slices = -(-dim // (SLICE if chunked else WIDE_SLICE))
    parts = CHUNKS if chunked else max(1, min(TASKS // slices, num_codes))
    merged = parts if chunked else 0
    partial = torch.empty((heads, merged, num_codes, dim), dtype=torch.float64, device="cpu")
    partial_counts = torch.empty((heads, merged, num_codes), dtype=torch.int64, device="cpu")
    tasks = heads * parts * slices
    parameters = [
        x.data_ptr(),
        strides.head,
        strides.row,
        0 if codebook is None else codebook.data_ptr(),
        0 if codebook is None else codebook.stride(0),
        partial.data_ptr(),
        rows,
        num_codes,
        dim,
        partial_counts.data_ptr(),
        indices.data_ptr(),
        parts,
        slices,
        counts.data_ptr(),
        sums.data_ptr(),
        0 if residual_sums is None else residual_sums.data_ptr(),
        tasks,
        heads,
        *strides[2:],
    ]
    launch(compiled(_sums if chunked else _large_sums, x.dtype), parameters, tasks, heads * rows * dim)


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.code_statistics`. ``x`` (H, N, D) or (H, B, N / B, D), ``indices`` (H, N) int64."""
    (heads, rows), dim = indices.shape, x.shape[-1]
    strides = row_strides(x)
    given, checked = indices.contiguous(), torch.empty((heads, rows), dtype=torch.int64)
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    counts = torch.empty((heads, num_codes), dtype=torch.int64)
    sums = empty((heads, num_codes, dim), computed)
    parameters = [x.data_ptr(), strides.head, strides.row, 0, 0, given.data_ptr(), rows, num_codes, dim, 0]
    parameters += [checked.data_ptr(), 0, 0, 0, 0, 0, 0, heads, *strides[2:]]
    launch(compiled(_countable, x.dtype), parameters, heads * CHUNKS, heads * rows * dim)
    sum_rows(x, checked, None, counts, sums, None)
    return counts, sums
