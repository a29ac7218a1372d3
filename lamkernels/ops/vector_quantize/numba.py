"""vector_quantize on the CPU: the lookup's blocks, and behind each, while its rows are in the cache, everything else.

Where the codebook is small, every chunk of rows also sums its residuals; the chunks are merged in order, in fp64, by
the thread that finishes last. Where it is large, the sums are a pass of their own (:mod:`code_statistics`).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.code_statistics.numba import sum_rows
from lamkernels.ops.constants import NOISE_EPS
from lamkernels.ops.cosine import unit_rows
from lamkernels.ops.nearest_code.numba import (
    COSINE,
    FLAGS,
    L2,
    LOOKUP,
    codes_of_head,
    elements,
    inverse_norm,
    make_scratch,
    make_staging,
    prepare_lookup,
    rows_of_block,
    scan,
    sizes_of,
    spread_rows,
)
from lamkernels.ops.parallel import compiled, empty, launch
from lamkernels.ops.simd import BITS, at, computed_type, fetch_add, narrow, quantize_rows, stored_type, widen, words
from lamkernels.ops.vector_quantize.numba_backward import vector_quantize_backward

__all__ = ["vector_quantize", "vector_quantize_backward"]

# The parameters behind those of the lookup: 0 quantized (H, N, D), 1 codebook in x.dtype, 2 its head stride, 3 mask or
# 0, 4 [NaN, 0] in x.dtype, 5 partial residual sums (tasks, K, D) or 0, 6 partial counts (tasks, K), 7 partial loss and
# rows (tasks, 2) fp64, 8 counts, 9 sums, 10 residual sums, 11 commitment loss, 12 codebook loss, 13 rows that are in,
# 14 noise (H, N, D) or 0, 15 codes (H, N, D), with noise, 16 x + (quantized − x) (H, N, D) or 0, for which a row that
# is not in gets the first code, 17 whether quantized is laid out as x, whose rows lie in groups
QUANTIZE = LOOKUP + 18
THROUGH, AS_X = LOOKUP + 16, LOOKUP + 17
STREAMED = 1 << 22  # bytes from which on the output is written past the caches
MAX_PARTS = 1 << 21  # entries of all partial sums
MIN_MERGED = 1 << 13  # codes of all chunks that are always merged


@njit(**FLAGS)
def quantize_chunks(p, stored, computed):
    """Everything that a chunk of rows takes part in; the thread that finishes last merges all and returns True."""
    a = carray(p, (QUANTIZE,))
    rows, num_codes, dim, chunk, block = a[8], a[9], a[10], a[15], a[16]
    chunks = (rows + chunk - 1) // chunk
    fill = elements(a[LOOKUP + 4], 0, 2, stored)
    _, codes = codes_of_head(a, 0, computed)
    scratch, loss, scales = make_scratch(block, dim, codes), np.zeros(1), np.ones(block, codes.mean.dtype)
    staging = make_staging(a, block, stored)
    vector = BITS // (8 * codes.mean.itemsize)  # entries
    large = a[18] * rows * dim * fill.itemsize >= STREAMED
    streamed = large and dim % vector == 0 and (a[LOOKUP] | a[LOOKUP + 15]) % (vector * fill.itemsize) == 0
    streamed = streamed and a[AS_X] == 0 and a[THROUGH] == 0
    spread = np.empty(block * dim if a[AS_X] != 0 else 0, fill.dtype)
    factors = np.empty(block if a[LOOKUP + 14] != 0 else 0, codes.mean.dtype)
    finished_last = False
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[18]:
            return finished_last
        head, first = task // chunks, task % chunks * chunk
        codebook, codes = codes_of_head(a, head, computed)
        stored_codes = elements(a[LOOKUP + 1], head * a[LOOKUP + 2], num_codes * dim, stored)
        masked, mask = a[LOOKUP + 3] != 0, elements(a[LOOKUP + 3], head * rows, rows, np.uint8(0))
        summing = a[LOOKUP + 5] != 0
        sums = elements(a[LOOKUP + 5], task * num_codes * dim, num_codes * dim, computed)
        counts = elements(a[LOOKUP + 6], task * num_codes, num_codes, np.int64(0))
        if summing:
            sums[:] = 0.0
            counts[:] = 0
        loss[0], inside = 0.0, 0
        options = a[12] == L2, a[13] != 0, a[14]
        for start in range(first, min(first + chunk, rows), block):
            count = min(start + block, first + chunk, rows) - start
            x, stride = rows_of_block(a, head, start, start + count, staging, stored)
            out = elements(a[17], head * rows + start, count, np.int64(0))
            scan(x, stride, codebook, codes, options, scratch, out)
            begin, size = (head * rows + start) * dim, count * dim
            quantized = spread[:size] if a[AS_X] != 0 else elements(a[LOOKUP], begin, size, stored)
            chosen = quantized if a[LOOKUP + 14] == 0 else elements(a[LOOKUP + 15], begin, size, stored)
            for n in range(count):
                if masked and mask[start + n] == 0:
                    out[n] = -1
                    quantized[n * dim : (n + 1) * dim] = fill[1]
                    chosen[n * dim : (n + 1) * dim] = fill[1]
                elif out[n] < 0 and a[THROUGH] != 0:
                    quantized[n * dim : (n + 1) * dim] = stored_codes[:dim]
                elif out[n] < 0:
                    quantized[n * dim : (n + 1) * dim] = fill[0]
                    chosen[n * dim : (n + 1) * dim] = fill[0]
            if a[12] == COSINE:
                for n in range(count):
                    scales[n] = inverse_norm(x[n * stride : n * stride + dim])
            before = loss[0]
            inside += quantize_rows(
                at(x, 0), stride, at(out, 0), count, dim, at(codebook, 0), at(stored_codes, 0), at(chosen, 0),
                at(sums, 0), at(counts, 0), at(loss, 0), summing, at(scales, 0), streamed,
            )  # fmt: skip
            if not loss[0] < np.inf:
                loss[0] = before + _loss_in_fp64(x, stride, out, codebook, scales)
            if a[LOOKUP + 14] != 0:
                noise = elements(a[LOOKUP + 14], begin, size, stored)
                _substitute(x, stride, scales, codebook, out, noise, quantized, factors, stored)
            if a[THROUGH] != 0:
                through = elements(a[THROUGH], begin, size, stored)
                for n in range(count):
                    here = slice(n * dim, (n + 1) * dim)
                    _pass_through(x[n * stride : n * stride + dim], quantized[here], through[here], stored)
            if a[AS_X] != 0:
                spread_rows(a, a[LOOKUP], head, start, start + count, spread, stored)
        part = elements(a[LOOKUP + 7], task * 2, 2, np.float64(0))
        part[0], part[1] = loss[0], inside
        if fetch_add(a, 1) == chunks * a[18] - 1:
            finished_last = True
            for h in range(a[18]):
                _finish(a, h, chunks, computed)


@njit(**FLAGS)
def _loss_in_fp64(x, stride, indices, codebook, scales):
    """The squared residuals of a block where those of fp32 overflow."""
    total = 0.0
    for n in range(indices.shape[0]):
        if indices[n] >= 0:
            row, code = x[n * stride : n * stride + codebook.shape[1]], codebook[indices[n]]
            for d in range(code.shape[0]):
                total += (np.float64(widen(row[d])) * scales[n] - np.float64(code[d])) ** 2
    return total


@njit(**FLAGS)
def _substitute(x, stride, scales, codebook, indices, noise, quantized, factors, stored):
    """NSVQ: quantized = x + (‖x − c‖ / ‖v‖ + ε) v of the rows of a block that are in; the lengths in fp64.

    A step at a time for all rows, so that while one row's sums arrive the next ones are under way.
    """
    dim = codebook.shape[1]
    for n in range(indices.shape[0]):
        row, code = carray(at(x, n * stride), (dim,)), carray(at(codebook, max(indices[n], 0) * dim), (dim,))
        residual, length = _squared_lengths(row, scales[n], code, carray(at(noise, n * dim), (dim,)))
        factors[n] = np.sqrt(residual / length) + NOISE_EPS if length > 0.0 else 0.0
    for n in range(indices.shape[0]):
        if indices[n] >= 0:
            row, direction = carray(at(x, n * stride), (dim,)), carray(at(noise, n * dim), (dim,))
            moved = carray(at(quantized, n * dim), (dim,))
            for d in range(dim):
                moved[d] = narrow(widen(row[d]) * scales[n] + factors[n] * widen(direction[d]), stored)


@njit(**FLAGS)
def _squared_lengths(row, scale, code, noise):
    """Of the residual and of the noise of one row."""
    residual, length = 0.0, 0.0
    for d in range(row.shape[0]):
        residual += (np.float64(widen(row[d]) * scale) - np.float64(code[d])) ** 2
        length += np.float64(widen(noise[d])) ** 2
    return residual, length


@njit(cache=True, nogil=True)  # reassociated it would be the code
def _pass_through(row, code, through, stored):
    """x + (q − x) of one row, each of the two rounded."""
    for d in range(row.shape[0]):
        difference = widen(narrow(widen(code[d]) - widen(row[d]), stored))
        through[d] = narrow(widen(row[d]) + difference, stored)


@njit(**FLAGS)
def _finish(a, head, chunks, computed):
    """The losses of a head and, where the chunks have sums, its counts and sums: in the order of the chunks."""
    num_codes, dim = a[9], a[10]
    loss, inside = 0.0, 0.0
    parts = elements(a[LOOKUP + 7], head * chunks * 2, chunks * 2, np.float64(0))
    for chunk in range(chunks):
        loss += parts[2 * chunk]
        inside += parts[2 * chunk + 1]
    loss /= max(inside, 1.0) * dim
    elements(a[LOOKUP + 11], head, 1, computed)[0] = loss
    elements(a[LOOKUP + 12], head, 1, computed)[0] = loss
    elements(a[LOOKUP + 13], head, 1, np.int64(0))[0] = np.int64(inside)
    if a[LOOKUP + 5] == 0:
        return
    size = num_codes * dim
    total, count = np.zeros(size, np.float64), elements(a[LOOKUP + 8], head * num_codes, num_codes, np.int64(0))
    count[:] = 0
    for part in range(head * chunks, (head + 1) * chunks):
        total += elements(a[LOOKUP + 5], part * size, size, computed)
        count += elements(a[LOOKUP + 6], part * num_codes, num_codes, np.int64(0))
    codebook, _ = codes_of_head(a, head, computed)
    sums = elements(a[LOOKUP + 9], head * size, size, computed)
    residual_sums = elements(a[LOOKUP + 10], head * size, size, computed)
    for k in range(num_codes):
        for d in range(dim):
            residual_sums[k * dim + d] = total[k * dim + d]
            code = np.float64(codebook[k, d])
            sums[k * dim + d] = total[k * dim + d] + np.float64(count[k]) * code if count[k] > 0 else 0.0


def _quantize(p):
    quantize_chunks(words(p), stored_type(p), computed_type(p))


@functools.cache
def nan_and_zero(dtype: torch.dtype) -> Tensor:
    """What the quantised entries of rows that are not finite, and of masked rows, are copied from."""
    return torch.tensor([torch.nan, 0.0], dtype=dtype, device="cpu")  # whatever the default device is


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, noise: Tensor | None, metric: str, precision: str, gradient: str
) -> tuple[Tensor, ...]:
    """``x`` (H, N, D) or (H, B, N / B, D), ``codebook`` (H, K, D), ``mask`` (H, N) bool or None, ``noise`` (H, N, D) or
    None.
    """
    heads, rows, (num_codes, dim) = x.shape[0], x.shape[1:-1].numel(), codebook.shape[1:]
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    quantized = empty((heads, rows, dim), x.dtype)
    indices = torch.empty((heads, rows), dtype=torch.int64)
    counts = torch.empty((heads, num_codes), dtype=torch.int64)
    sums, residual_sums = (empty((heads, num_codes, dim), computed) for _ in range(2))
    commitment_loss, codebook_loss = (torch.zeros(heads, dtype=computed) for _ in range(2))
    num_rows = torch.zeros(heads, dtype=torch.int64)

    summing = sums_by_chunk(heads, rows, num_codes, dim, computed.itemsize)
    lookup = prepare_lookup(x, codebook, metric, precision, indices, summing)
    computed_codebook = lookup.tensors[1]
    stored_codebook = computed_codebook if x.dtype == computed else codebook.to(x.dtype).contiguous()
    mask = None if mask is None else mask.contiguous()
    noise = None if noise is None else noise.contiguous()
    codes = empty((heads, 0 if noise is None else rows, dim), x.dtype)
    partial_sums = torch.empty((lookup.tasks, num_codes, dim) if summing else 0, dtype=computed)
    partial_counts = torch.empty((lookup.tasks, num_codes) if summing else 0, dtype=torch.int64)
    partial_loss = torch.empty((lookup.tasks, 2), dtype=torch.float64)
    fill = nan_and_zero(x.dtype)
    parameters = [
        *lookup.parameters,
        quantized.data_ptr(),
        stored_codebook.data_ptr(),
        stored_codebook.stride(0),
        0 if mask is None else mask.data_ptr(),
        fill.data_ptr(),
        partial_sums.data_ptr() if summing else 0,
        partial_counts.data_ptr() if summing else 0,
        partial_loss.data_ptr(),
        counts.data_ptr(),
        sums.data_ptr(),
        residual_sums.data_ptr(),
        commitment_loss.data_ptr(),
        codebook_loss.data_ptr(),
        num_rows.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        codes.data_ptr(),
        0,
        False,
    ]
    launch(compiled(_quantize, x.dtype), parameters, lookup.tasks, lookup.work)
    if not summing:
        summed = unit_rows(x, computed) if metric == "cosine" else x
        sum_rows(summed, indices, computed_codebook, counts, sums, residual_sums)
    return quantized, indices, commitment_loss, codebook_loss, counts, sums, residual_sums, num_rows, codes


def sums_by_chunk(heads: int, rows: int, num_codes: int, dim: int, itemsize: int) -> bool:
    """Whether every chunk sums by itself: where merging costs less than a pass of its own, in a few MiB."""
    chunks = heads * sizes_of(rows, num_codes, dim, itemsize, True).chunks
    return 0 < chunks * num_codes * dim <= MAX_PARTS and 2 * chunks * num_codes <= max(heads * rows, MIN_MERGED)
