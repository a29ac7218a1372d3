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

from lamkernels.ops.code_statistics.numba import MAX_CHUNKED, sum_rows
from lamkernels.ops.nearest_code.numba import (
    BITS_BF16,
    BITS_F16,
    F32,
    F64,
    FLAGS,
    LOOKUP,
    codes_of_head,
    compiled,
    elements,
    make_scratch,
    prepare_lookup,
    rows_of_head,
    scan,
)
from lamkernels.ops.parallel import launch
from lamkernels.ops.simd import at, fetch_add, narrow, quantize_rows, widen

# The parameters behind those of the lookup: 0 quantized (H, N, D), 1 codebook in x.dtype, 2 its head stride, 3 mask or
# 0, 4 [NaN, 0] in x.dtype, 5 partial residual sums (tasks, K, D) or 0, 6 partial counts (tasks, K), 7 partial loss and
# rows (tasks, 2) fp64, 8 counts, 9 sums, 10 residual sums, 11 commitment loss, 12 codebook loss, 13 rows that are in
QUANTIZE = LOOKUP + 14


@njit(**FLAGS)
def _quantize_chunks(p, stored, computed):
    a = carray(p, (QUANTIZE,))
    rows, stride, num_codes, dim, chunk, block = a[8], a[4], a[9], a[10], a[15], a[16]
    chunks = (rows + chunk - 1) // chunk
    fill = elements(a[LOOKUP + 4], 0, 2, stored)
    _, codes = codes_of_head(a, 0, computed)
    scratch, loss = make_scratch(block, dim, codes), np.zeros(1)
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[18]:
            return
        head, first = task // chunks, task % chunks * chunk
        codebook, codes = codes_of_head(a, head, computed)
        x = rows_of_head(a, head, stored)
        out = elements(a[17], head * rows, rows, np.int64(0))
        quantized = elements(a[LOOKUP], head * rows * dim, rows * dim, stored)
        stored_codes = elements(a[LOOKUP + 1], head * a[LOOKUP + 2], num_codes * dim, stored)
        masked, mask = a[LOOKUP + 3] != 0, elements(a[LOOKUP + 3], head * rows, rows, np.uint8(0))
        summing = a[LOOKUP + 5] != 0
        sums = elements(a[LOOKUP + 5], task * num_codes * dim, num_codes * dim, computed)
        counts = elements(a[LOOKUP + 6], task * num_codes, num_codes, np.int64(0))
        if summing:
            sums[:] = 0.0
            counts[:] = 0
        loss[0], inside = 0.0, 0
        options = a[12] != 0, a[13] != 0, a[14]
        for start in range(first, min(first + chunk, rows), block):
            stop = min(start + block, first + chunk, rows)
            scan(x, stride, start, stop, rows - 1, codebook, codes, options, scratch, out)
            for n in range(start, stop):
                if masked and mask[n] == 0:
                    out[n] = -1
                    quantized[n * dim : (n + 1) * dim] = fill[1]
                elif out[n] < 0:
                    quantized[n * dim : (n + 1) * dim] = fill[0]
            inside += quantize_rows(
                at(x, start * stride), stride, at(out, start), stop - start, dim, at(codebook, 0),
                at(stored_codes, 0), at(quantized, start * dim), at(sums, 0), at(counts, 0), at(loss, 0), summing,
            )  # fmt: skip
        part = elements(a[LOOKUP + 7], task * 2, 2, np.float64(0))
        part[0], part[1] = loss[0], inside
        if fetch_add(a, 1) == chunks * a[18] - 1:
            for h in range(a[18]):
                _finish(a, h, chunks, computed)


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


# int64 parameters of the backward: 2 x, 3 head stride, 4 row stride, 5 quantized (H, N, D), 6 indices (H, N),
# 7 gradient of quantized or 0, 8 N, 9 K, 10 D, 11 to 13 its strides, 14 gradient of the commitment loss (H,), 15 of the
# codebook loss (H,), 16 rows that are in (H,), 17 residual sums, 18 gradient of x, 19 of the codebook, 20 H, 21 chunk
BACKWARD = 22
BACKWARD_CHUNK = 1 << 16  # entries of x in a task


@njit(**FLAGS)
def _backward_chunks(p, stored, computed):
    a = carray(p, (BACKWARD,))
    rows, num_codes, dim, chunk = a[8], a[9], a[10], a[21]
    chunks = (rows + chunk - 1) // chunk + 1  # the last one is the codebook's
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[20]:
            return
        head, first = task // chunks, task % chunks * chunk
        inside = elements(a[16], head, 1, np.int64(0))[0]
        scale = 2.0 / (np.float64(max(inside, 1)) * np.float64(dim))
        if task % chunks == chunks - 1:
            weight = -scale * elements(a[15], head, 1, computed)[0]
            residual_sums = elements(a[17], head * num_codes * dim, num_codes * dim, computed)
            grad_codebook = elements(a[19], head * num_codes * dim, num_codes * dim, computed)
            for i in range(num_codes * dim):
                grad_codebook[i] = weight * residual_sums[i]
            continue
        weight = narrow(scale * elements(a[14], head, 1, computed)[0], computed)
        x = rows_of_head(a, head, stored)
        quantized = elements(a[5], head * rows * dim, rows * dim, stored)
        indices = elements(a[6], head * rows, rows, np.int64(0))
        grad_x = elements(a[18], head * rows * dim, rows * dim, stored)
        for n in range(first, min(first + chunk, rows)):
            to = grad_x[n * dim : (n + 1) * dim]
            if indices[n] < 0:
                to[:] = 0
                continue
            row, code = x[n * a[4] : n * a[4] + dim], quantized[n * dim : (n + 1) * dim]
            if a[7] == 0:
                for d in range(dim):
                    to[d] = narrow(weight * (widen(row[d]) - widen(code[d])), stored)
            elif a[13] == 1:
                grad = elements(a[7], head * a[11] + n * a[12], dim, stored)
                for d in range(dim):
                    to[d] = narrow(widen(grad[d]) + weight * (widen(row[d]) - widen(code[d])), stored)
            else:  # an expanded gradient, as sum() sends it
                same = widen(elements(a[7], head * a[11] + n * a[12], 1, stored)[0])
                for d in range(dim):
                    to[d] = narrow(same + weight * (widen(row[d]) - widen(code[d])), stored)


def _quantize_f32(p):
    _quantize_chunks(p, F32, F32)


def _quantize_f64(p):
    _quantize_chunks(p, F64, F64)


def _quantize_bf16(p):
    _quantize_chunks(p, BITS_BF16, F32)


def _quantize_f16(p):
    _quantize_chunks(p, BITS_F16, F32)


def _backward_f32(p):
    _backward_chunks(p, F32, F32)


def _backward_f64(p):
    _backward_chunks(p, F64, F64)


def _backward_bf16(p):
    _backward_chunks(p, BITS_BF16, F32)


def _backward_f16(p):
    _backward_chunks(p, BITS_F16, F32)


_QUANTIZE = {
    torch.float32: _quantize_f32,
    torch.float64: _quantize_f64,
    torch.bfloat16: _quantize_bf16,
    torch.float16: _quantize_f16,
}
_BACKWARD = {
    torch.float32: _backward_f32,
    torch.float64: _backward_f64,
    torch.bfloat16: _backward_bf16,
    torch.float16: _backward_f16,
}


@functools.cache
def _nan_and_zero(dtype: torch.dtype) -> Tensor:
    return torch.tensor([torch.nan, 0.0], dtype=dtype)


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str
) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.vector_quantize`. ``x`` (H, N, D), ``codebook`` (H, K, D), ``mask`` (H, N) bool or None."""
    (heads, rows, dim), num_codes = x.shape, codebook.shape[1]
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    quantized = torch.empty((heads, rows, dim), dtype=x.dtype)
    indices = torch.empty((heads, rows), dtype=torch.int64)
    counts = torch.empty((heads, num_codes), dtype=torch.int64)
    sums, residual_sums = (torch.empty((heads, num_codes, dim), dtype=computed) for _ in range(2))
    commitment_loss, codebook_loss = (torch.zeros(heads, dtype=computed) for _ in range(2))
    num_rows = torch.zeros(heads, dtype=torch.int64)

    lookup = prepare_lookup(x, codebook, metric, precision, indices)
    x, computed_codebook, _ = lookup.tensors
    stored_codebook = computed_codebook if x.dtype == computed else codebook.to(x.dtype).contiguous()
    mask = None if mask is None else mask.contiguous()
    summing = num_codes * dim <= MAX_CHUNKED and lookup.tasks > 0
    partial_sums = torch.empty((lookup.tasks, num_codes, dim) if summing else 0, dtype=computed)
    partial_counts = torch.empty((lookup.tasks, num_codes) if summing else 0, dtype=torch.int64)
    partial_loss = torch.empty((lookup.tasks, 2), dtype=torch.float64)
    fill = _nan_and_zero(x.dtype)
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
    ]
    launch(compiled(_QUANTIZE[x.dtype]), parameters, lookup.tasks, lookup.work)
    if not summing:
        sum_rows(x, indices, computed_codebook, counts, sums, residual_sums)
    return quantized, indices, commitment_loss, codebook_loss, counts, sums, residual_sums, num_rows


def vector_quantize_backward(
    x: Tensor,
    quantized: Tensor,
    indices: Tensor,
    residual_sums: Tensor,
    num_rows: Tensor,
    grad_quantized: Tensor | None,
    grad_commitment: Tensor,
    grad_codebook_loss: Tensor,
) -> tuple[Tensor, Tensor]:
    """One pass over the rows and one over the residual sums; see the reference for the formulas."""
    (heads, rows, dim), num_codes = x.shape, residual_sums.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    quantized, indices, residual_sums = quantized.contiguous(), indices.contiguous(), residual_sums.contiguous()
    grad_commitment, grad_codebook_loss = grad_commitment.contiguous(), grad_codebook_loss.contiguous()
    num_rows = num_rows.contiguous()
    if grad_quantized is not None and grad_quantized.stride(-1) not in (0, 1):
        grad_quantized = grad_quantized.contiguous()
    grad_x = torch.empty((heads, rows, dim), dtype=x.dtype)
    grad_codebook = torch.empty_like(residual_sums)
    chunk = max(1, BACKWARD_CHUNK // dim)
    parameters = [
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        quantized.data_ptr(),
        indices.data_ptr(),
        0 if grad_quantized is None else grad_quantized.data_ptr(),
        rows,
        num_codes,
        dim,
        *((0, 0, 0) if grad_quantized is None else grad_quantized.stride()),
        grad_commitment.data_ptr(),
        grad_codebook_loss.data_ptr(),
        num_rows.data_ptr(),
        residual_sums.data_ptr(),
        grad_x.data_ptr(),
        grad_codebook.data_ptr(),
        heads,
        chunk,
    ]
    tasks = heads * (-(-rows // chunk) + 1)
    launch(compiled(_BACKWARD[x.dtype]), parameters, tasks, 4 * heads * rows * dim)
    return grad_x, grad_codebook
