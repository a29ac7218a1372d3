"""finite_scalar_quantize on the CPU: blocks of rows, one column at a time, so that the loops over rows are vectors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.eager import apply, is_ordinary
from lamkernels.ops.elementary import exp_negative
from lamkernels.ops.finite_scalar_quantize import op
from lamkernels.ops.finite_scalar_quantize.levels import tables
from lamkernels.ops.nearest_code.numba import FLAGS, elements
from lamkernels.ops.parallel import compiled, empty, empty_like, launch, run
from lamkernels.ops.simd import computed_type, fetch_add, narrow, stored_type, widen, words
from lamkernels.ops.vector_quantize.numba import nan_and_zero

BLOCK = 256  # rows; a column of them and what is computed of it stay in the first cache
CHUNK = 4096  # rows in a task
COUNTED = 32  # levels up to which counting all thresholds, in vectors, beats a binary search, one entry at a time

# int64 parameters: 2 x, 3 head stride, 4 row stride, 5 indices (H, N), 6 N, 7 D, 8 padded thresholds P, 9 H, 10 slopes
# and shifts (2, D); forward: 11 thresholds (D, P), 12 codes (D, P + 1) in x.dtype, 13 strides (D,), 14 quantized
# (H, N, D), 15 NaN in x.dtype; backward: 11 gradient of quantized, 12 to 14 its strides, 15 gradient of x (H, N, D)
PARAMETERS = 16
Parameters = ctypes.c_int64 * PARAMETERS


@njit(**FLAGS)
def _quantize_chunks(p, stored, computed):
    a = carray(p, (PARAMETERS,))
    rows, dim, padded, stride = a[6], a[7], a[8], a[4]
    chunks = (rows + CHUNK - 1) // CHUNK
    thresholds, codes = elements(a[11], 0, dim * padded, computed), elements(a[12], 0, dim * (padded + 1), stored)
    strides, fill = elements(a[13], 0, dim, np.int64(0)), elements(a[15], 0, 1, stored)
    column, check = np.full(BLOCK, computed), np.full(BLOCK, computed)
    position, index = np.zeros(BLOCK, np.int32), np.zeros(BLOCK, np.int64)
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[9]:
            return
        head, start = task // chunks, task % chunks * CHUNK
        x = elements(a[2], head * a[3], max(rows - 1, 0) * stride + dim, stored)
        indices = elements(a[5], head * rows, rows, np.int64(0))
        quantized = elements(a[14], head * rows * dim, rows * dim, stored)
        for first in range(start, min(start + CHUNK, rows), BLOCK):
            size = min(first + BLOCK, start + CHUNK, rows) - first
            check[:] = computed
            index[:] = 0
            for d in range(dim):
                for i in range(size):
                    column[i] = widen(x[(first + i) * stride + d])
                _positions(column, thresholds[d * padded : (d + 1) * padded], position)
                for i in range(size):
                    check[i] += column[i] * computed  # NaN from a NaN or an infinity
                    index[i] += np.int64(position[i]) * strides[d]
                for i in range(size):
                    quantized[(first + i) * dim + d] = codes[d * (padded + 1) + position[i]]
            for i in range(size):
                indices[first + i] = index[i] if check[i] == computed else -1
                if check[i] != computed:
                    quantized[(first + i) * dim : (first + i + 1) * dim] = fill[0]


@njit(**FLAGS)
def _positions(column, thresholds, position):
    """How many thresholds are at or below each entry; the padding of the thresholds is +inf."""
    position[:] = 0
    if thresholds.size < COUNTED:
        for j in range(thresholds.size):
            threshold = thresholds[j]
            for i in range(BLOCK):
                position[i] += column[i] >= threshold
        return
    for i in range(BLOCK):
        step = (thresholds.size + 1) // 2
        while step > 0:
            position[i] += step if column[i] >= thresholds[position[i] + step - 1] else 0
            step //= 2


@njit(**FLAGS)
def _backward_chunks(p, stored, computed):
    a = carray(p, (PARAMETERS,))
    rows, dim, stride = a[6], a[7], a[4]
    chunks = (rows + CHUNK - 1) // CHUNK
    slopes, shifts = elements(a[10], 0, dim, computed), elements(a[10], dim, dim, computed)
    column, grad = np.full(BLOCK, computed), np.full(BLOCK, computed)
    one, two = narrow(1.0, computed), narrow(2.0, computed)
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[9]:
            return
        head, start = task // chunks, task % chunks * CHUNK
        x = elements(a[2], head * a[3], max(rows - 1, 0) * stride + dim, stored)
        indices = elements(a[5], head * rows, rows, np.int64(0))
        grad_x = elements(a[15], head * rows * dim, rows * dim, stored)
        for first in range(start, min(start + CHUNK, rows), BLOCK):
            size = min(first + BLOCK, start + CHUNK, rows) - first
            for d in range(dim):
                factor, shift = two * two * slopes[d], shifts[d]
                for i in range(size):
                    column[i] = widen(x[(first + i) * stride + d])
                    offset = head * a[12] + (first + i) * a[13] + d * a[14]
                    grad[i] = widen(elements(a[11], offset, 1, stored)[0])
                for i in range(BLOCK):  # 1 − tanh² = 4e / (1 + e)², which does not cancel
                    e = exp_negative(-two * abs(column[i] + shift))
                    grad[i] *= factor * e / ((one + e) * (one + e))
                for i in range(size):
                    kept = grad[i] if indices[first + i] >= 0 else computed
                    grad_x[(first + i) * dim + d] = narrow(kept, stored)


def _quantize(p):
    _quantize_chunks(words(p), stored_type(p), computed_type(p))


def _backward(p):
    _backward_chunks(words(p), stored_type(p), computed_type(p))


def finite_scalar_quantize(x: Tensor, levels: Sequence[int], rounding: int) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.finite_scalar_quantize`. ``x`` (H, N, D)."""
    (heads, rows, dim), x = x.shape, x if x.stride(-1) == 1 else x.contiguous()
    thresholds, codes, slopes, steps = tables(tuple(levels), rounding, x.dtype, x.device)
    quantized, indices = empty((heads, rows, dim), x.dtype), torch.empty((heads, rows), dtype=torch.int64)
    fill = nan_and_zero(x.dtype)
    outputs = (thresholds, codes, steps, quantized, fill)
    parameters = [*_common(x, indices, thresholds, slopes), *(t.data_ptr() for t in outputs)]
    work = heads * rows * sum(levels)
    launch(compiled(_quantize, x.dtype), parameters, heads * -(-rows // CHUNK), work)
    return quantized, indices


def finite_scalar_quantize_backward(
    x: Tensor, indices: Tensor, grad_quantized: Tensor, levels: Sequence[int], rounding: int
) -> Tensor:
    """See the reference for the formula."""
    (heads, rows, dim), x, indices = x.shape, x if x.stride(-1) == 1 else x.contiguous(), indices.contiguous()
    thresholds, _, slopes, _ = tables(tuple(levels), rounding, x.dtype, x.device)
    grad_x = empty((heads, rows, dim), x.dtype)
    parameters = _common(x, indices, thresholds, slopes)
    parameters += [grad_quantized.data_ptr(), *grad_quantized.stride(), grad_x.data_ptr()]
    launch(compiled(_backward, x.dtype), parameters, heads * -(-rows // CHUNK), 16 * heads * rows * dim)
    return grad_x


def _common(x: Tensor, indices: Tensor, thresholds: Tensor, slopes: Tensor) -> list[int]:
    (heads, rows, dim), padded = x.shape, thresholds.shape[1]
    head, row, _ = x.stride()
    return [x.data_ptr(), head, row, indices.data_ptr(), rows, dim, padded, heads, slopes.data_ptr()]


class Plan(NamedTuple):
    """What all calls of one shape have in common; the arrays are without the addresses of a call."""

    forward: Any
    backward: Any
    indices: Tensor  # like those of a call: zeros that share one entry
    kernel: Any
    kernel_backward: Any
    tasks: int
    work: int


@functools.lru_cache(maxsize=1024)
def _plan(shape: torch.Size, dtype: torch.dtype, levels: tuple[int, ...], rounding: int) -> Plan:
    """For contiguous x."""
    dim, rows = len(levels), shape.numel() // len(levels)
    thresholds, codes, slopes, steps = tables(levels, rounding, dtype, torch.device("cpu"))
    common = (0, 0, 0, 0, dim, 0, rows, dim, thresholds.shape[1], 1, slopes.data_ptr())
    constants = thresholds.data_ptr(), codes.data_ptr(), steps.data_ptr(), 0, nan_and_zero(dtype).data_ptr()
    return Plan(
        Parameters(*common, *constants), Parameters(*common, 0, 0, dim, 1, 0),
        torch.zeros((), dtype=torch.int64, device="cpu").expand(shape[:-1]), compiled(_quantize, dtype),
        compiled(_backward, dtype), -(-rows // CHUNK), rows * sum(levels),
    )  # fmt: skip


def quantize(x: Tensor, levels: tuple[int, ...], rounding: int) -> tuple[Tensor, Tensor]:
    """The operator without the dispatcher, for x (..., D) that is plain."""
    plan = _plan(x.shape, x.dtype, levels, rounding)
    if x.requires_grad and torch.is_grad_enabled():
        return apply(Quantize, x, plan, levels, rounding)  # type: ignore[no-any-return]
    return _forward_in_one_call(x.contiguous(), plan)


def _forward_in_one_call(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    quantized, indices = empty_like(x), torch.empty_like(plan.indices, memory_format=torch.contiguous_format)
    array = Parameters.from_buffer_copy(plan.forward)
    array[2], array[5], array[14] = x.data_ptr(), indices.data_ptr(), quantized.data_ptr()
    run(plan.kernel, ctypes.addressof(array), plan.tasks, plan.work)
    return quantized, indices


class Quantize(torch.autograd.Function):
    """x (..., D) -> quantized, indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, levels: tuple[int, ...], rounding: int) -> tuple[Tensor, Tensor]:
        quantized, indices = _forward_in_one_call(x.contiguous(), plan)
        ctx.plan, ctx.options = plan, (levels, rounding)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, indices)
        return quantized, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, indices = ctx.saved_tensors
        if is_ordinary(grad):
            grad_x, array = empty_like(x), Parameters.from_buffer_copy(ctx.plan.backward)
            x, indices, grad = x.contiguous(), indices.contiguous(), grad.contiguous()
            array[2], array[5], array[11], array[15] = (t.data_ptr() for t in (x, indices, grad, grad_x))
            run(ctx.plan.kernel_backward, ctypes.addressof(array), ctx.plan.tasks, 16 * x.numel())
        else:
            rows = (1, -1, x.shape[-1])
            grad_x = op.finite_scalar_quantize_backward(
                x.reshape(rows), indices.reshape(1, -1), grad.reshape(rows), *ctx.options, "numba"
            ).reshape(x.shape)
        return grad_x, None, None, None
