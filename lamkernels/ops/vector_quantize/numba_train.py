"""One training step of an EMA codebook as one call: lookup, output, statistics and the update of the averages.

At the sizes latent action models train with, calls cost more than arithmetic. This is :mod:`numba`'s forward, to
the same bits, with the EMA behind it, and the backward for the rows alone, under an autograd function
instead of the dispatcher: no vmap and no compilation, so the module takes it only in eager mode.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.nearest_code.numba import (
    FLAGS,
    L2,
    LOOKUP,
    Strides,
    elements,
    lookup_parameters,
    prepare_heads,
    sizes_of,
)
from lamkernels.ops.parallel import MIN_WORK_PER_THREAD, compiled, entry, run
from lamkernels.ops.simd import computed_type, stored_type, words
from lamkernels.ops.vector_quantize.numba import (
    BACKWARD,
    QUANTIZE,
    backward,
    nan_and_zero,
    quantize_chunks,
    sums_by_chunk,
)
from lamkernels.ops.vector_quantize.op import vector_quantize_backward

MAX_WORK = 1 << 22  # N·K·D up to which a call's cost counts

# The parameters behind those of the quantisation: 0 cluster sizes (K,), 1 code sums (K, D), 2 codebook (K, D), all in
# the computed type, 3 and 4 the bits of the decay and of ε as fp64, 5 how many rows are in, 6 the address of the
# scratch, to which the elements in SCRATCH are relative, 7 whether this call prepares and 8 whether it does the rest
ROWS_IN = QUANTIZE + 5
TRAIN = QUANTIZE + 9
SCRATCH = (7, *range(LOOKUP + 5, LOOKUP + 11), LOOKUP + 12)


@njit(**FLAGS)
def _train(p, stored, computed):
    a = carray(p, (TRAIN,))
    if a[QUANTIZE + 7] != 0:
        for place in SCRATCH:
            a[place] += a[QUANTIZE + 6]
        a[LOOKUP + 13] = a[ROWS_IN:].ctypes.data
        prepare_heads(p, computed)
        a[0] = 0
    if a[QUANTIZE + 8] == 0 or not quantize_chunks(p, stored, computed) or a[ROWS_IN] == 0:
        return  # with no row that is in, the averages stay
    num_codes, dim = a[9], a[10]
    settings = a.view(np.float64)
    new, eps = 1.0 - settings[QUANTIZE + 3], settings[QUANTIZE + 4]
    counts = elements(a[LOOKUP + 8], 0, num_codes, np.int64(0))
    sums = elements(a[LOOKUP + 9], 0, num_codes * dim, computed)
    sizes = elements(a[QUANTIZE], 0, num_codes, computed)
    averages = elements(a[QUANTIZE + 1], 0, num_codes * dim, computed)
    codebook = elements(a[QUANTIZE + 2], 0, num_codes * dim, computed)
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


CPU = torch.device("cpu")  # named, because another device may be the default
STORED_AS = {torch.float32: (torch.float32, torch.bfloat16, torch.float16), torch.float64: (torch.float64,)}
TrainArray, BackwardArray = ctypes.c_int64 * TRAIN, ctypes.c_int64 * BACKWARD


class Plan(NamedTuple):
    """What all steps of one shape have in common."""

    forward: Any  # TrainArray and BackwardArray without the addresses
    backward: Any
    entries: int  # of scratch, in the computed type
    tasks: int
    work: int


@functools.lru_cache(maxsize=256)
def _plan(
    rows: int, row_stride: int, num_codes: int, dim: int, stored: torch.dtype, computed: torch.dtype,
    decay: float, eps: float, precision: str,
) -> Plan | None:  # fmt: skip
    """None where the step is too large for one call, or for tensors that the kernel cannot take."""
    accepted = STORED_AS.get(computed, ())  # averages in half precision are refused elsewhere
    if not 0 < rows * num_codes * dim <= MAX_WORK or stored not in accepted:
        return None
    item, work = computed.itemsize, rows * num_codes * dim
    if not sums_by_chunk(1, rows, num_codes, dim, item):
        return None
    cut = sizes_of(rows, num_codes, dim, item, True)
    size, tasks = num_codes * dim, cut.chunks
    # one piece of scratch: counts, partial counts and partial losses in 8 bytes; then in the computed type sums,
    # residual sums, partial sums, the other loss and the prepared codebook
    words = (1 + tasks) * num_codes + 2 * tasks
    sums = 8 * words
    other_loss = sums + (2 + tasks) * size * item
    bits = (ctypes.c_int64 * 2).from_buffer_copy((ctypes.c_double * 2)(decay, eps))
    forward = TrainArray(
        0, 0,
        *lookup_parameters(
            0, Strides(0, row_stride), (0, 0), other_loss + item, (rows, num_codes, dim), cut, L2, precision, 0, 1
        ),
        0, 0, size, 0, nan_and_zero(stored).data_ptr(), sums + 2 * size * item, 8 * num_codes,
        8 * (1 + tasks) * num_codes, 0, sums, sums + size * item, 0, other_loss, 0, 0, 0,
        0, 0, 0, *bits, 0, 0, 1, 1,
    )  # fmt: skip
    backward = BackwardArray(
        0, 0, 0, 0, row_stride, 0, 0, 0, rows, 0, dim, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, rows, 0, 0, 0, 0, 0, 0, 0
    )
    return Plan(forward, backward, words * (8 // item) + (2 + tasks) * size + 1 + cut.workspace, tasks, work)


def plan(
    x: Tensor, codebook: Tensor, sizes: Tensor, averages: Tensor, decay: float, eps: float, precision: str
) -> Plan | None:
    """The plan for x (..., D) and EMA buffers (K, D), (K,) and (K, D), or None where this path does not take them."""
    if codebook.ndim != 2 or x.ndim == 0:
        return None
    (num_codes, dim), computed = codebook.shape, codebook.dtype
    if not (
        x.shape[-1] == dim
        and sizes.shape == (num_codes,)
        and averages.shape == codebook.shape
        and computed == sizes.dtype == averages.dtype
        and x.is_cpu and codebook.is_cpu and sizes.is_cpu and averages.is_cpu
        and codebook.is_contiguous() and sizes.is_contiguous() and averages.is_contiguous()
    ):  # fmt: skip
        return None
    row_stride = dim if x.is_contiguous() else _as_rows(x, dim).stride(0)
    return _plan(x.numel() // dim, row_stride, num_codes, dim, x.dtype, computed, decay, eps, precision)


class TrainStep(torch.autograd.Function):
    """x (..., D) -> quantized (..., D), indices (...,), commitment loss (); updates the three EMA buffers in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, sizes: Tensor, averages: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        stored = x.dtype
        rows = _as_rows(x, codebook.shape[1])
        quantized = torch.empty_like(x, memory_format=torch.contiguous_format)
        indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=CPU)
        loss, scratch = codebook.new_empty(()), codebook.new_empty(plan.entries)
        stored_codes = codebook if stored == codebook.dtype else codebook.to(stored)
        array = TrainArray.from_buffer_copy(plan.forward)
        array[2], array[5], array[17] = rows.data_ptr(), codebook.data_ptr(), indices.data_ptr()
        array[LOOKUP], array[LOOKUP + 1], array[LOOKUP + 11] = (
            quantized.data_ptr(), stored_codes.data_ptr(), loss.data_ptr(),
        )  # fmt: skip
        array[QUANTIZE], array[QUANTIZE + 1], array[QUANTIZE + 2], array[QUANTIZE + 6] = (
            sizes.data_ptr(), averages.data_ptr(), codebook.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        kernel, address = compiled(_train_step, stored), ctypes.addressof(array)
        if plan.work >= MIN_WORK_PER_THREAD:
            array[QUANTIZE + 8] = 0
            entry(kernel)(address)
            array[QUANTIZE + 7], array[QUANTIZE + 8] = 0, 1
        run(kernel, address, plan.tasks, plan.work)
        if not codebook.is_inference():
            torch.autograd.graph.increment_version((codebook, sizes, averages))  # autograd notices the update by it
        ctx.rows_in, ctx.plan = array[ROWS_IN], plan
        visible = indices if ctx.rows_in == rows.shape[0] else indices.clamp(min=0)
        ctx.mark_non_differentiable(visible)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, quantized, indices)
        return quantized, visible, loss

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor | None, _: None, grad_loss: Tensor | None) -> Any:
        given = [grad for grad in (grad_quantized, grad_loss) if grad is not None]
        # the operator refuses second derivatives, and has a batching rule
        run = _backward if not torch.is_grad_enabled() and all(map(_has_memory, given)) else _by_operator
        return run(ctx, grad_quantized, grad_loss), None, None, None, None


def _has_memory(tensor: Tensor) -> bool:
    """A batch of gradients under vmap has none."""
    try:
        return tensor.data_ptr() is not None
    except RuntimeError:
        return False


def _by_operator(ctx: Any, grad_quantized: Tensor | None, grad_loss: Tensor | None) -> Tensor:
    x, quantized, indices = ctx.saved_tensors
    dim, device = x.shape[-1], x.device
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    no_sums, zero = torch.zeros(1, 1, dim, dtype=computed, device=device), torch.zeros(1, dtype=computed, device=device)
    grad_x, _ = vector_quantize_backward(
        x.reshape(1, -1, dim), quantized.reshape(1, -1, dim), indices.reshape(1, -1), no_sums,
        torch.tensor([ctx.rows_in], device=device), None,
        None if grad_quantized is None else grad_quantized.reshape(1, -1, dim),
        zero if grad_loss is None else grad_loss.reshape(1), zero, "l2", "ste", "numba",
    )  # fmt: skip
    gradient: Tensor = grad_x.reshape(x.shape)
    return gradient


def _backward(ctx: Any, grad_quantized: Tensor | None, grad_loss: Tensor | None) -> Tensor:
    x, quantized, indices = ctx.saved_tensors
    dim = x.shape[-1]
    rows = _as_rows(x, dim)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if grad_loss is None:
        computed = torch.float64 if x.dtype == torch.float64 else torch.float32
        grad_loss = torch.zeros((), dtype=computed, device=CPU)
    array = BackwardArray.from_buffer_copy(ctx.plan.backward)
    array[2], array[5], array[6] = rows.data_ptr(), quantized.data_ptr(), indices.data_ptr()
    if grad_quantized is not None:
        grad = grad_quantized if grad_quantized.ndim == 2 else grad_quantized.reshape(-1, dim)
        if grad.stride(1) not in (0, 1):
            grad = grad.contiguous()
        array[7] = grad.data_ptr()
        array[12], array[13] = grad.stride()
    array[14] = array[15] = grad_loss.data_ptr()
    rows_in = ctypes.c_int64(ctx.rows_in)
    array[16], array[18] = ctypes.addressof(rows_in), grad_x.data_ptr()
    entry(compiled(backward, x.dtype))(ctypes.addressof(array))
    return grad_x


def _as_rows(x: Tensor, dim: int) -> Tensor:
    """(N, D) with neighbours of a row next to each other in memory."""
    rows = x if x.ndim == 2 else x.reshape(-1, dim)
    return rows if rows.stride(1) == 1 else rows.contiguous()
