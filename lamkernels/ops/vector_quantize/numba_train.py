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
    FLAGS,
    L2,
    LOOKUP,
    elements,
    lookup_parameters,
    prepare_heads,
    sizes_of,
)
from lamkernels.ops.parallel import compiled, entry
from lamkernels.ops.simd import computed_type, stored_type, words
from lamkernels.ops.vector_quantize.numba import (
    BACKWARD,
    QUANTIZE,
    backward,
    nan_and_zero,
    quantize_chunks,
    sums_by_chunk,
)

MAX_WORK = 1 << 22  # N·K·D up to which one thread is as fast as several

# The parameters behind those of the quantisation: 0 cluster sizes (K,), 1 code sums (K, D), 2 codebook (K, D), all in
# the computed type, 3 and 4 the bits of the decay and of ε as fp64, 5 the place of how many rows are in
ROWS_IN = QUANTIZE + 5
TRAIN = QUANTIZE + 6


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


def _train_step(p):
    _train(words(p), stored_type(p), computed_type(p))


@functools.cache
def _bits(value: float) -> int:
    return ctypes.c_int64.from_buffer_copy(ctypes.c_double(value)).value


CPU = torch.device("cpu")  # named, because another device may be the default
TrainArray, BackwardArray = ctypes.c_int64 * TRAIN, ctypes.c_int64 * BACKWARD


def fits(x: Tensor, codebook: Tensor, sizes: Tensor, averages: Tensor) -> bool:
    """Whether rows x (..., D) and EMA buffers (K, D), (K,) and (K, D) are small and laid out as this path needs."""
    if codebook.ndim != 2 or x.ndim == 0:
        return False
    num_codes, dim = codebook.shape
    return (
        0 < x.numel() * num_codes <= MAX_WORK
        and x.shape[-1] == dim
        and sizes.shape == (num_codes,)
        and averages.shape == codebook.shape
        and all(
            t.dtype == codebook.dtype and t.device == x.device and t.is_contiguous()
            for t in (codebook, sizes, averages)
        )
        and sums_by_chunk(1, x.numel() // dim, num_codes, dim, codebook.itemsize)
    )


class TrainStep(torch.autograd.Function):
    """x (..., D) -> quantized (..., D), indices (...,), commitment loss (); updates the three EMA buffers in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, sizes: Tensor, averages: Tensor, decay: float, eps: float, precision: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        (num_codes, dim), computed, stored = codebook.shape, codebook.dtype, x.dtype
        rows = _as_rows(x, dim)
        count, item = rows.shape[0], computed.itemsize
        cut = sizes_of(count, num_codes, dim, item, True)
        size, tasks = num_codes * dim, cut.chunks
        quantized = torch.empty(x.shape, dtype=stored, device=CPU)
        indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=CPU)
        loss = torch.empty((), dtype=computed, device=CPU)
        # one piece of scratch: counts, partial counts and partial losses in 8 bytes; then in the computed type sums,
        # residual sums, partial sums, the other loss and the prepared codebook
        words = (1 + tasks) * num_codes + 2 * tasks
        entries = words * (8 // item) + (2 + tasks) * size + 1 + cut.workspace
        scratch = torch.empty(entries, dtype=computed, device=CPU)
        at = scratch.data_ptr()
        at_sums = at + 8 * words
        at_other_loss = at_sums + (2 + tasks) * size * item
        stored_codes = codebook if stored == computed else codebook.to(stored)
        array = TrainArray(
            0, 0,
            *lookup_parameters(
                (rows.data_ptr(), 0, rows.stride(0)), (codebook.data_ptr(), 0), at_other_loss + item,
                (count, num_codes, dim), cut, L2, precision, indices.data_ptr(), 1,
            ),
            quantized.data_ptr(), stored_codes.data_ptr(), size, 0, nan_and_zero(stored).data_ptr(),
            at_sums + 2 * size * item, at + 8 * num_codes, at + 8 * (1 + tasks) * num_codes, at, at_sums,
            at_sums + size * item, loss.data_ptr(), at_other_loss, 0, 0, 0,
            sizes.data_ptr(), averages.data_ptr(), codebook.data_ptr(), _bits(decay), _bits(eps), 0,
        )  # fmt: skip
        place = ctypes.addressof(array)
        array[LOOKUP + 13] = place + 8 * ROWS_IN
        entry(compiled(_train_step, stored))(place)
        for buffer in (codebook, sizes, averages):
            if not buffer.is_inference():
                torch.autograd.graph.increment_version(buffer)  # autograd notices an in-place update by it
        ctx.rows_in = array[ROWS_IN]
        visible = indices if ctx.rows_in == count else indices.clamp(min=0)
        ctx.mark_non_differentiable(visible)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, quantized, indices)
        return quantized, visible, loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_quantized: Tensor | None, _: None, grad_loss: Tensor | None) -> Any:
        x, quantized, indices = ctx.saved_tensors
        dim = x.shape[-1]
        rows = _as_rows(x, dim)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=CPU)
        if grad_loss is None:
            computed = torch.float64 if x.dtype == torch.float64 else torch.float32
            grad_loss = torch.zeros((), dtype=computed, device=CPU)
        grad, grad_strides = 0, [0, 0]
        if grad_quantized is not None:
            grad_quantized = grad_quantized.reshape(-1, dim)
            if grad_quantized.stride(1) not in (0, 1):
                grad_quantized = grad_quantized.contiguous()
            grad, grad_strides = grad_quantized.data_ptr(), list(grad_quantized.stride())
        count, at_loss = rows.shape[0], grad_loss.data_ptr()
        array = BackwardArray(
            0, 0, rows.data_ptr(), 0, rows.stride(0), quantized.data_ptr(), indices.data_ptr(), grad, count, 0, dim, 0,
            *grad_strides, at_loss, at_loss, 0, 0, grad_x.data_ptr(), 0, 1, count, 0, 0, 0, 0,
        )  # fmt: skip
        rows_in = ctypes.c_int64(ctx.rows_in)
        array[16] = ctypes.addressof(rows_in)
        entry(compiled(backward, x.dtype))(ctypes.addressof(array))
        return grad_x, None, None, None, None, None, None


def _as_rows(x: Tensor, dim: int) -> Tensor:
    """(N, D) with neighbours of a row next to each other in memory."""
    rows = x if x.ndim == 2 else x.reshape(-1, dim)
    return rows if rows.stride(1) == 1 else rows.contiguous()
