"""lookup_free_quantize on the CPU: the rows of a block that are in are packed, so that their losses are flat loops."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.eager import apply, is_ordinary
from lamkernels.ops.elementary import exp_negative, log1p_of_fraction
from lamkernels.ops.lookup_free_quantize import op
from lamkernels.ops.nearest_code.numba import FLAGS, elements
from lamkernels.ops.parallel import ZERO, bits, compiled, empty, launch
from lamkernels.ops.simd import computed_type, fetch_add, narrow, stored_type, widen, words

BLOCK = 64  # rows: packed, they stay in the first cache
CHUNK = 4096  # rows in a task
Options = tuple[float, float, bool]  # s, 4βs, whether a zero stays zero
LARGEST = 1000.0  # a logit whose other probability is 0 in every dtype

# int64 parameters: 2 x, 3 head stride, 4 row stride, 5 indices (H, N), 6 N, 7 D, 8 H, 9 and 10 the bits of s and 4βs as
# fp64, 11 whether a zero stays zero, 12 rows that are in (H,); forward: 13 mask or 0, 14 quantized (H, N, D), 15
# [s, −s, 0, NaN] in x.dtype, 16 partial (tasks, 3) fp64: commitment, entropy, rows, 17 commitment loss (H,), 18 entropy
# (H,); backward: 13 gradient of quantized or 0, 14 to 16 its strides, 17 gradient of the commitment loss (H,), 18 of
# the entropy (H,), 19 of x
PARAMETERS = 20


@njit(**FLAGS)
def _quantize_chunks(p, stored, computed):
    a = carray(p, (PARAMETERS - 1,))
    rows, dim, stride = a[6], a[7], a[4]
    chunks = (rows + CHUNK - 1) // CHUNK
    scale, logit_scale = narrow(a.view(np.float64)[9], computed), narrow(a.view(np.float64)[10], computed)
    codes = elements(a[15], 0, 4, stored)
    packed = np.full(BLOCK * dim, computed)
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[8]:
            return
        head, start = task // chunks, task % chunks * CHUNK
        x = elements(a[2], head * a[3], max(rows - 1, 0) * stride + dim, stored)
        indices = elements(a[5], head * rows, rows, np.int64(0))
        quantized = elements(a[14], head * rows * dim, rows * dim, stored)
        mask = elements(a[13], head * rows, rows, np.uint8(0))
        part = elements(a[16], task * 3, 3, np.float64(0))
        part[:] = 0.0
        for first in range(start, min(start + CHUNK, rows), BLOCK):
            inside = 0
            for n in range(first, min(first + BLOCK, start + CHUNK, rows)):
                row, to = x[n * stride : n * stride + dim], quantized[n * dim : (n + 1) * dim]
                if a[13] != 0 and mask[n] == 0:
                    indices[n] = -1
                    to[:] = codes[2]
                    continue
                indices[n] = _row(row, a[11] != 0, codes, to, packed[inside * dim : (inside + 1) * dim], computed)
                inside += indices[n] >= 0
            commitment, entropy = _losses(packed[: inside * dim], scale, logit_scale, a[11] != 0, computed)
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
    parts = elements(a[16], head * chunks * 3, chunks * 3, np.float64(0))
    for chunk in range(chunks):
        total += parts[chunk * 3 : (chunk + 1) * 3]
    count = max(total[2], 1.0)
    elements(a[17], head, 1, computed)[0] = total[0] / (count * a[7])
    elements(a[18], head, 1, computed)[0] = total[1] / count
    elements(a[12], head, 1, np.int64(0))[0] = np.int64(total[2])


@njit(**FLAGS)
def _backward_chunks(p, stored, computed):
    a = carray(p, (PARAMETERS,))
    rows, dim, stride = a[6], a[7], a[4]
    chunks = (rows + CHUNK - 1) // CHUNK
    settings = a.view(np.float64)
    scale, logit_scale = narrow(settings[9], computed), narrow(settings[10], computed)
    one, largest = narrow(1.0, computed), narrow(LARGEST, computed)
    packed = np.full(BLOCK * dim, computed)
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[8]:
            return
        head, start = task // chunks, task % chunks * CHUNK
        x = elements(a[2], head * a[3], max(rows - 1, 0) * stride + dim, stored)
        indices = elements(a[5], head * rows, rows, np.int64(0))
        grad_x = elements(a[19], head * rows * dim, rows * dim, stored)
        count = np.float64(max(elements(a[12], head, 1, np.int64(0))[0], 1))
        commitment = narrow(2.0 / (count * dim) * elements(a[17], head, 1, computed)[0], computed)
        entropy = narrow(-settings[10] / count * elements(a[18], head, 1, computed)[0], computed)
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
                packed[i] = commitment * (value - _code(value, scale, a[11] != 0, computed)) + entropy * slope
            for n in range(size):
                to = grad_x[(first + n) * dim : (first + n + 1) * dim]
                own = packed[n * dim : (n + 1) * dim]
                if indices[first + n] < 0:
                    to[:] = 0
                    continue
                for d in range(dim):
                    if a[13] != 0:
                        offset = head * a[14] + (first + n) * a[15] + d * a[16]
                        own[d] += widen(elements(a[13], offset, 1, stored)[0])
                    to[d] = narrow(own[d], stored)


def _quantize(p):
    _quantize_chunks(words(p), stored_type(p), computed_type(p))


def _backward(p):
    _backward_chunks(words(p), stored_type(p), computed_type(p))


def lookup_free_quantize(
    x: Tensor, mask: Tensor | None, scale: float, logit_scale: float, keep_zero: bool
) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.lookup_free_quantize`. ``x`` (H, N, D), ``mask`` (H, N) bool or None."""
    return _forward(x, mask, (scale, logit_scale, keep_zero), x.shape[:1])


def lookup_free_quantize_backward(
    x: Tensor, indices: Tensor, num_rows: Tensor, grad_quantized: Tensor | None, grad_commitment: Tensor,
    grad_entropy: Tensor, scale: float, logit_scale: float, keep_zero: bool,
) -> Tensor:  # fmt: skip
    """One pass over the rows; see the reference for the formula."""
    grads = grad_quantized, grad_commitment, grad_entropy
    return _backward_of(x, indices, num_rows, grads, (scale, logit_scale, keep_zero), x.shape[:1])


def _forward(
    x: Tensor, mask: Tensor | None, options: Options, heads: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator for x (H, N, D) and ``heads`` (H,), or for one head in rows of any shape and ``heads`` ()."""
    x = x if heads and x.stride(-1) == 1 else x.contiguous()
    count, rows = _sizes(x, heads)
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    quantized, indices = empty(x.shape, x.dtype), torch.empty(x.shape[:-1], dtype=torch.int64, device="cpu")
    tasks = count * -(-rows // CHUNK)
    make = torch.empty if tasks else torch.zeros  # the last task writes them
    commitment, entropy = (make(heads, dtype=computed, device="cpu") for _ in range(2))
    num_rows = make(heads, dtype=torch.int64, device="cpu")
    mask = None if mask is None else mask.contiguous()
    partial, codes = torch.empty(tasks * 3, dtype=torch.float64, device="cpu"), _codes(options[0], x.dtype)
    parameters = (
        *_common(x, indices, num_rows, options, heads), 0 if mask is None else mask.data_ptr(), quantized.data_ptr(),
        codes.data_ptr(), partial.data_ptr(), commitment.data_ptr(), entropy.data_ptr(),
    )  # fmt: skip
    launch(compiled(_quantize, x.dtype), parameters, tasks, 16 * x.numel())
    return quantized, indices, commitment, entropy, num_rows


def _backward_of(
    x: Tensor, indices: Tensor, num_rows: Tensor, grads: tuple[Tensor | None, Tensor, Tensor], options: Options,
    heads: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """The gradient of x, from those of quantized, commitment loss and entropy; shapes as in :func:`_forward`."""
    x = x if heads and x.stride(-1) == 1 else x.contiguous()
    indices, num_rows = indices.contiguous(), num_rows.contiguous()
    grad, grad_commitment, grad_entropy = grads[0], grads[1].contiguous(), grads[2].contiguous()
    count, rows = _sizes(x, heads)
    of_quantized: tuple[int, ...] = (0, 0, 0, 0)
    if grad is not None:
        grad = grad if heads else grad.contiguous()
        of_quantized = grad.data_ptr(), *(grad.stride() if heads else (0, x.shape[-1], 1))
    grad_x = empty(x.shape, x.dtype)
    parameters = (
        *_common(x, indices, num_rows, options, heads), *of_quantized, grad_commitment.data_ptr(),
        grad_entropy.data_ptr(), grad_x.data_ptr(),
    )  # fmt: skip
    launch(compiled(_backward, x.dtype), parameters, count * -(-rows // CHUNK), 16 * x.numel())
    return grad_x


def _sizes(x: Tensor, heads: tuple[int, ...]) -> tuple[int, int]:
    """H and N."""
    return (heads[0], x.shape[1]) if heads else (1, x.numel() // x.shape[-1])


def _common(x: Tensor, indices: Tensor, num_rows: Tensor, options: Options, heads: tuple[int, ...]) -> tuple[int, ...]:
    (count, rows), dim, (scale, logit_scale, keep_zero) = _sizes(x, heads), x.shape[-1], options
    strides = (x.stride(0), x.stride(1)) if heads else (0, dim)
    addresses = x.data_ptr(), *strides, indices.data_ptr(), rows, dim, count
    return *addresses, bits(scale), bits(logit_scale), keep_zero, num_rows.data_ptr()


@functools.lru_cache
def _codes(scale: float, dtype: torch.dtype) -> Tensor:
    """What entries are quantised to."""
    return torch.tensor([scale, -scale, 0.0, torch.nan], dtype=dtype, device="cpu")


def quantize(
    x: Tensor, mask: Tensor | None, scale: float, logit_scale: float, keep_zero: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator without the dispatcher, for one head of rows x (..., D) and a mask (...,) that are plain.

    Returns:
        quantized (..., D), indices (...,), commitment loss () and sample entropy ().
    """
    options = scale, logit_scale, keep_zero
    if x.requires_grad and torch.is_grad_enabled():
        return apply(Quantize, x, mask, options)  # type: ignore[no-any-return]
    return _forward(x, mask, options, ())[:4]


class Quantize(torch.autograd.Function):
    """x (..., D) -> quantized, indices, commitment loss, sample entropy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantized, indices, commitment, entropy, num_rows = _forward(x, mask, options, ())
        ctx.options, ctx.computed = options, entropy.dtype
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, indices, num_rows)
        return quantized, indices, commitment, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None, *of_losses: Tensor | None) -> tuple[Tensor, None, None]:
        x, indices, num_rows = ctx.saved_tensors
        of_commitment, of_entropy = (ZERO[ctx.computed] if of_loss is None else of_loss for of_loss in of_losses)
        if is_ordinary(grad, of_commitment, of_entropy):
            grads = grad, of_commitment, of_entropy
            return _backward_of(x, indices, num_rows, grads, ctx.options, ()), None, None
        rows = (1, -1, x.shape[-1])
        grad_x = op.lookup_free_quantize_backward(
            x.reshape(rows), indices.reshape(1, -1), num_rows.reshape(1), None if grad is None else grad.reshape(rows),
            of_commitment.reshape(1), of_entropy.reshape(1), *ctx.options, "numba",
        )  # fmt: skip
        return grad_x.reshape(x.shape), None, None
