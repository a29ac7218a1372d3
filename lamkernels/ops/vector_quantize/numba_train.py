"""One training step of an EMA codebook as one call: lookup, output, statistics and the update of the averages.

At the sizes latent action models train with, calls cost more than arithmetic. This is :mod:`numba`'s forward on one
thread, to the same bits, with the EMA behind it, and the backward for the rows alone, under an autograd function
instead of the dispatcher: no vmap and no compilation, so the module takes it only in eager mode.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.nearest_code.numba import (
    BITS_BF16,
    BITS_F16,
    F32,
    F64,
    FLAGS,
    LOOKUP,
    elements,
    lay_out_lookup,
    prepare_heads,
)
from lamkernels.ops.parallel import call, compiled
from lamkernels.ops.vector_quantize.numba import (
    MAX_CHUNKED,
    QUANTIZE,
    backward_kernel,
    nan_and_zero,
    quantize_chunks,
)

MAX_WORK = 1 << 22  # N·K·D up to which one thread is as fast as several

# The parameters behind those of the quantisation: 0 cluster sizes (K,), 1 code sums (K, D), 2 codebook (K, D), all in
# the computed type, 3 and 4 the bits of the decay and of ε as fp64
TRAIN = QUANTIZE + 5


@njit(**FLAGS)
def _train(p, stored, computed):
    a = carray(p, (TRAIN,))
    prepare_heads(p, computed)
    a[0] = 0
    quantize_chunks(p, stored, computed)
    num_codes, dim = a[9], a[10]
    settings = carray(p, (TRAIN,)).view(np.float64)
    new, eps = 1.0 - settings[QUANTIZE + 3], settings[QUANTIZE + 4]
    counts, sums = (
        elements(a[LOOKUP + 8], 0, num_codes, np.int64(0)),
        elements(a[LOOKUP + 9], 0, num_codes * dim, computed),
    )
    sizes, averages = (
        elements(a[QUANTIZE], 0, num_codes, computed),
        elements(a[QUANTIZE + 1], 0, num_codes * dim, computed),
    )
    codebook = elements(a[QUANTIZE + 2], 0, num_codes * dim, computed)
    if elements(a[LOOKUP + 13], 0, 1, np.int64(0))[0] == 0:
        return  # no row is in: the averages stay
    total = 0.0
    for k in range(num_codes):
        sizes[k] += new * (counts[k] - sizes[k])
        total += sizes[k]
    scale = (total + num_codes * eps) / total
    for k in range(num_codes):
        smoothed = scale / (sizes[k] + eps)
        for d in range(k * dim, (k + 1) * dim):
            averages[d] += new * (sums[d] - averages[d])
            codebook[d] = averages[d] * smoothed


def _train_f32(p):
    _train(p, F32, F32)


def _train_f64(p):
    _train(p, F64, F64)


def _train_bf16(p):
    _train(p, BITS_BF16, F32)


def _train_f16(p):
    _train(p, BITS_F16, F32)


_TRAIN = {
    torch.float32: _train_f32,
    torch.float64: _train_f64,
    torch.bfloat16: _train_bf16,
    torch.float16: _train_f16,
}


@functools.cache
def _bits(value: float) -> int:
    return ctypes.c_int64.from_buffer_copy(ctypes.c_double(value)).value


def fits(x: Tensor, codebook: Tensor) -> bool:
    """Whether a step of rows x (..., D) and a codebook (K, D) is small enough for this path."""
    return 0 < x.numel() * codebook.shape[0] <= MAX_WORK and codebook.numel() <= MAX_CHUNKED


class TrainStep(torch.autograd.Function):
    """x (..., D) -> quantized (..., D), indices (...,), commitment loss (); updates the three EMA buffers in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, sizes: Tensor, averages: Tensor, decay: float, eps: float, precision: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_codes, dim = codebook.shape
        rows = x.reshape(1, -1, dim)
        quantized = torch.empty(x.shape, dtype=x.dtype)
        indices = torch.empty(x.shape[:-1], dtype=torch.int64)
        loss = torch.empty((), dtype=codebook.dtype)
        lookup = lay_out_lookup(rows, codebook[None], "l2", precision, indices)
        stored = codebook if x.dtype == codebook.dtype else codebook.to(x.dtype)
        # in entries of the computed type: sums, residual sums, partial sums, the other loss
        size, tasks = num_codes * dim, lookup.tasks
        floats = torch.empty((2 + tasks) * size + 1, dtype=codebook.dtype)
        at, item = floats.data_ptr(), floats.itemsize
        wide = torch.empty((1 + tasks) * num_codes + 2 * tasks + 1, dtype=torch.int64)  # counts, parts, losses, rows
        at_wide = wide.data_ptr()
        fill = nan_and_zero(x.dtype)
        num_rows = at_wide + 8 * ((1 + tasks) * num_codes + 2 * tasks)
        call(
            compiled(_TRAIN[x.dtype]),
            (
                *lookup.parameters, quantized.data_ptr(), stored.data_ptr(), size, 0, fill.data_ptr(),
                at + 2 * size * item, at_wide + 8 * num_codes, at_wide + 8 * (1 + tasks) * num_codes, at_wide, at,
                at + size * item, loss.data_ptr(), at + (2 + tasks) * size * item, num_rows, 0, 0,
                sizes.data_ptr(), averages.data_ptr(), codebook.data_ptr(), _bits(decay), _bits(eps),
            ),
        )  # fmt: skip
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, quantized, indices)
        ctx.wide, ctx.num_rows = wide, num_rows  # the address, and what keeps it alive
        return quantized, indices, loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_quantized: Tensor | None, _: None, grad_loss: Tensor | None) -> Any:
        x, quantized, indices = ctx.saved_tensors
        dim = x.shape[-1]
        rows = x.reshape(-1, dim)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        if grad_loss is None:
            grad_loss = torch.zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        grad, strides = 0, [0, 0]
        if grad_quantized is not None:
            grad_quantized = grad_quantized.reshape(-1, dim)
            if grad_quantized.stride(1) not in (0, 1):
                grad_quantized = grad_quantized.contiguous()
            grad, strides = grad_quantized.data_ptr(), list(grad_quantized.stride())
        n = rows.shape[0]
        call(
            backward_kernel(x.dtype),
            (
                rows.data_ptr(), 0, rows.stride(0), quantized.data_ptr(), indices.data_ptr(), grad, n, 0, dim, 0,
                *strides, grad_loss.data_ptr(), grad_loss.data_ptr(), ctx.num_rows, 0, grad_x.data_ptr(), 0, 1,
                max(1, n), 0, 0, False, False,
            ),
        )  # fmt: skip
        return grad_x, None, None, None, None, None, None
