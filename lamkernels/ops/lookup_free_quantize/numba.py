"""lookup_free_quantize on the CPU: the rows of a block that are in are packed, so that their losses are flat loops."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.elementary import exp_negative, log1p_of_fraction
from lamkernels.ops.nearest_code.numba import (
    FLAGS,
    elements,
)
from lamkernels.ops.parallel import compiled, empty, launch
from lamkernels.ops.simd import computed_type, fetch_add, narrow, stored_type, widen, words

BLOCK = 64  # rows: packed, they stay in the first cache
CHUNK = 4096  # rows in a task
LARGEST = 1000.0  # a logit whose other probability is 0 in every dtype

# int64 parameters: 2 x, 3 head stride, 4 row stride, 5 indices (H, N), 6 N, 7 D, 8 H, 9 [s, 4βs] fp64, 10 whether a
# zero stays zero, 11 rows that are in (H,); forward: 12 mask or 0, 13 quantized (H, N, D), 14 [s, −s, 0, NaN] in
# x.dtype, 15 partial (tasks, 3) fp64: commitment, entropy, rows, 16 commitment loss (H,), 17 entropy (H,); backward: 12
# gradient of quantized or 0, 13 to 15 its strides, 16 gradient of the commitment loss (H,), 17 of the entropy (H,), 18
# of x
PARAMETERS = 19


@njit(**FLAGS)
def _quantize_chunks(p, stored, computed):
    a = carray(p, (PARAMETERS - 1,))
    rows, dim, stride = a[6], a[7], a[4]
    chunks = (rows + CHUNK - 1) // CHUNK
    constants = elements(a[9], 0, 2, np.float64(0))
    scale, logit_scale = narrow(constants[0], computed), narrow(constants[1], computed)
    codes = elements(a[14], 0, 4, stored)
    packed = np.full(BLOCK * dim, computed)
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[8]:
            return
        head, start = task // chunks, task % chunks * CHUNK
        x = elements(a[2], head * a[3], max(rows - 1, 0) * stride + dim, stored)
        indices = elements(a[5], head * rows, rows, np.int64(0))
        quantized = elements(a[13], head * rows * dim, rows * dim, stored)
        mask = elements(a[12], head * rows, rows, np.uint8(0))
        part = elements(a[15], task * 3, 3, np.float64(0))
        part[:] = 0.0
        for first in range(start, min(start + CHUNK, rows), BLOCK):
            inside = 0
            for n in range(first, min(first + BLOCK, start + CHUNK, rows)):
                row, to = x[n * stride : n * stride + dim], quantized[n * dim : (n + 1) * dim]
                if a[12] != 0 and mask[n] == 0:
                    indices[n] = -1
                    to[:] = codes[2]
                    continue
                indices[n] = _row(row, a[10] != 0, codes, to, packed[inside * dim : (inside + 1) * dim], computed)
                inside += indices[n] >= 0
            commitment, entropy = _losses(packed[: inside * dim], scale, logit_scale, a[10] != 0, computed)
            part[0] += commitment
            part[1] += entropy
            part[2] += inside
        if fetch_add(a, 1) == chunks * a[8] - 1:
            for h in range(a[8]):
                _finish(a, h, chunks, computed)


@njit(**FLAGS)
def _row(row, keep_zero, codes, to, packed, computed):
    """Writes the code of a row and its entries in the computed type; returns its index, −1 if it is not finite."""
    index, check = np.int64(0), computed
    for d in range(row.size):
        value = widen(row[d])
        packed[d] = value
        check += value * computed  # NaN from a NaN or an infinity
        index = 2 * index + (value > 0)
        to[d] = codes[0] if value > 0 else codes[2] if value == 0 and keep_zero else codes[1]
    if check == computed:
        return index
    to[:] = codes[3]
    return np.int64(-1)


@njit(**FLAGS)
def _code(value, scale, keep_zero, computed):
    return scale if value > 0 else computed if value == 0 and keep_zero else -scale


@njit(**FLAGS)
def _losses(packed, scale, logit_scale, keep_zero, computed):
    """Σ (x − q)² and Σ H(σ(4βs·x)) of packed entries."""
    commitment, entropy = np.float64(0.0), computed
    one, largest = narrow(1.0, computed), narrow(LARGEST, computed)
    for i in range(packed.size):
        residual = packed[i] - _code(packed[i], scale, keep_zero, computed)
        commitment += np.float64(residual) * residual
    for i in range(packed.size):
        logit = min(abs(logit_scale * packed[i]), largest)
        e = exp_negative(-logit)
        entropy += log1p_of_fraction(e) + logit * e / (one + e)
    return commitment, entropy


@njit(**FLAGS)
def _finish(a, head, chunks, computed):
    """Adds the chunks of a head in order."""
    total = np.zeros(3)
    parts = elements(a[15], head * chunks * 3, chunks * 3, np.float64(0))
    for chunk in range(chunks):
        total += parts[chunk * 3 : (chunk + 1) * 3]
    count = max(total[2], 1.0)
    elements(a[16], head, 1, computed)[0] = total[0] / (count * a[7])
    elements(a[17], head, 1, computed)[0] = total[1] / count
    elements(a[11], head, 1, np.int64(0))[0] = np.int64(total[2])


@njit(**FLAGS)
def _backward_chunks(p, stored, computed):
    a = carray(p, (PARAMETERS,))
    rows, dim, stride = a[6], a[7], a[4]
    chunks = (rows + CHUNK - 1) // CHUNK
    constants = elements(a[9], 0, 2, np.float64(0))
    scale, logit_scale = narrow(constants[0], computed), narrow(constants[1], computed)
    one, largest = narrow(1.0, computed), narrow(LARGEST, computed)
    packed = np.full(BLOCK * dim, computed)
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[8]:
            return
        head, start = task // chunks, task % chunks * CHUNK
        x = elements(a[2], head * a[3], max(rows - 1, 0) * stride + dim, stored)
        indices = elements(a[5], head * rows, rows, np.int64(0))
        grad_x = elements(a[18], head * rows * dim, rows * dim, stored)
        count = np.float64(max(elements(a[11], head, 1, np.int64(0))[0], 1))
        commitment = narrow(2.0 / (count * dim) * elements(a[16], head, 1, computed)[0], computed)
        entropy = narrow(-constants[1] / count * elements(a[17], head, 1, computed)[0], computed)
        for first in range(start, min(start + CHUNK, rows), BLOCK):
            size = min(first + BLOCK, start + CHUNK, rows) - first
            for n in range(size):
                for d in range(dim):
                    packed[n * dim + d] = widen(x[(first + n) * stride + d])
            for i in range(size * dim):
                value = packed[i]
                logit = min(abs(logit_scale * value), largest)
                e = exp_negative(-logit)
                slope = logit * e / ((one + e) * (one + e))
                slope = -slope if value < 0 else slope
                packed[i] = commitment * (value - _code(value, scale, a[10] != 0, computed)) + entropy * slope
            for n in range(size):
                to = grad_x[(first + n) * dim : (first + n + 1) * dim]
                own = packed[n * dim : (n + 1) * dim]
                if indices[first + n] < 0:
                    to[:] = 0
                    continue
                for d in range(dim):
                    if a[12] != 0:
                        offset = head * a[13] + (first + n) * a[14] + d * a[15]
                        own[d] += widen(elements(a[12], offset, 1, stored)[0])
                    to[d] = narrow(own[d], stored)


def _quantize(p):
    _quantize_chunks(words(p), stored_type(p), computed_type(p))


def _backward(p):
    _backward_chunks(words(p), stored_type(p), computed_type(p))


def lookup_free_quantize(
    x: Tensor, mask: Tensor | None, scale: float, logit_scale: float, keep_zero: bool
) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.lookup_free_quantize`. ``x`` (H, N, D), ``mask`` (H, N) bool or None."""
    (heads, rows, dim), x = x.shape, x if x.stride(-1) == 1 else x.contiguous()
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    quantized, indices = empty((heads, rows, dim), x.dtype), torch.empty((heads, rows), dtype=torch.int64)
    commitment, entropy = (torch.zeros(heads, dtype=computed) for _ in range(2))
    num_rows = torch.zeros(heads, dtype=torch.int64)
    mask = None if mask is None else mask.contiguous()
    constants = torch.tensor([scale, logit_scale], dtype=torch.float64)
    codes = torch.tensor([scale, -scale, 0.0, torch.nan], dtype=x.dtype)
    tasks = heads * -(-rows // CHUNK)
    partial = torch.empty((tasks, 3), dtype=torch.float64)
    outputs = (quantized, codes, partial, commitment, entropy)
    parameters = _common(x, indices, constants, keep_zero, num_rows)
    parameters += [0 if mask is None else mask.data_ptr(), *(t.data_ptr() for t in outputs)]
    launch(compiled(_quantize, x.dtype), parameters, tasks, 16 * heads * rows * dim)
    return quantized, indices, commitment, entropy, num_rows


def lookup_free_quantize_backward(
    x: Tensor, indices: Tensor, num_rows: Tensor, grad_quantized: Tensor | None, grad_commitment: Tensor,
    grad_entropy: Tensor, scale: float, logit_scale: float, keep_zero: bool,
) -> Tensor:  # fmt: skip
    """One pass over the rows; see the reference for the formula."""
    (heads, rows, dim), x = x.shape, x if x.stride(-1) == 1 else x.contiguous()
    indices, num_rows = indices.contiguous(), num_rows.contiguous()
    grad_commitment, grad_entropy = grad_commitment.contiguous(), grad_entropy.contiguous()
    constants = torch.tensor([scale, logit_scale], dtype=torch.float64)
    grad_x = empty((heads, rows, dim), x.dtype)
    parameters = _common(x, indices, constants, keep_zero, num_rows)
    parameters += [0] * 4 if grad_quantized is None else [grad_quantized.data_ptr(), *grad_quantized.stride()]
    parameters += [grad_commitment.data_ptr(), grad_entropy.data_ptr(), grad_x.data_ptr()]
    launch(compiled(_backward, x.dtype), parameters, heads * -(-rows // CHUNK), 16 * heads * rows * dim)
    return grad_x


def _common(x: Tensor, indices: Tensor, constants: Tensor, keep_zero: bool, num_rows: Tensor) -> list[int]:
    heads, rows, dim = x.shape
    head, row, _ = x.stride()
    addresses = x.data_ptr(), head, row, indices.data_ptr(), rows, dim, heads
    return [*addresses, constants.data_ptr(), keep_zero, num_rows.data_ptr()]
