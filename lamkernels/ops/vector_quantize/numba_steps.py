"""Whole steps of drop-in modules as one compiled call each, on the plans of :mod:`numba_one_call`.

What a module does beside the quantisation, counters, perplexity and averages, costs more in torch operators than the
quantisation itself. Here the kernel does it, while it has the counts at hand.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lamkernels.eager import apply, is_ordinary
from lamkernels.ops.nearest_code.numba import Strides
from lamkernels.ops.parallel import ZERO, bits, empty_like, run
from lamkernels.ops.vector_quantize.numba import THROUGH
from lamkernels.ops.vector_quantize.numba_backward import BACKWARD_CHUNK, LOSS_WEIGHTS
from lamkernels.ops.vector_quantize.numba_one_call import (
    CODES,
    NOTHING,
    RESIDUAL_SUMS,
    averages_in,
    by_operator,
    empty_loss,
    forward,
    visible_indices,
)
from lamkernels.ops.vector_quantize.numba_plan import (
    CALLS_USED,
    GROUPS_USED,
    LAPO_AVERAGES,
    LOSS_WEIGHT,
    PERPLEXITY,
    SUBTRACTED,
    BackwardArray,
    Plan,
    plan,
)


def noise_step(
    last: Tensor, codebook: Tensor, first: Tensor, plan: Plan, noise: Tensor, used: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`lamkernels.steps.noise_step`."""
    constant: list[Tensor] = []  # what has no gradient costs less past the autograd function than through it
    quantized: Tensor = apply(NoiseStep, last, codebook, first, plan, noise, used, constant)
    indices, perplexity = constant
    return quantized, indices, perplexity


class NoiseStep(torch.autograd.Function):
    """last, codebook, first -> quantized; puts indices and perplexity into ``constant`` and adds to ``used``."""

    @staticmethod
    def forward(
        ctx: Any, last: Tensor, codebook: Tensor, first: Tensor, plan: Plan, noise: Tensor, used: Tensor,
        constant: list[Tensor],
    ) -> Tensor:  # fmt: skip
        size, perplexity = last.numel(), empty_loss(codebook)
        # what only the backward reads, in one piece: last − first, the codes of the rows, and the sums of x − code
        kept = last.new_empty(2 * size + codebook.numel())
        at, step = kept.data_ptr(), size * last.itemsize
        settings = {
            2: at, CODES: at + step, RESIDUAL_SUMS: at + 2 * step, SUBTRACTED: first.data_ptr(),
            SUBTRACTED + 1: last.data_ptr(), PERPLEXITY: perplexity.data_ptr(), CALLS_USED: used.data_ptr(),
        }  # fmt: skip
        quantized, indices, _, ctx.rows_in = forward(last, codebook, plan, (None, None, noise), NOTHING, settings)
        constant += visible_indices(indices, ctx.rows_in), perplexity
        ctx.plan, ctx.computed, ctx.codes = plan, codebook.dtype, codebook.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, indices, noise)
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 7
        grad_codebook: Tensor | None
        kept, indices, noise = ctx.saved_tensors
        _, of_codebook, of_first, *_ = ctx.needs_input_grad
        lie_as_made = kept.is_contiguous() and indices.is_contiguous() and noise.is_contiguous()
        if lie_as_made and ctx.plan.pulls and of_codebook and grad.is_contiguous() and is_ordinary(grad):
            grad_x, grad_codebook = _through_noise(ctx, kept, indices, noise, grad)
        else:
            size = noise.numel()
            x, codes, sums = kept[:size].view(noise.shape), kept[size : 2 * size].view(noise.shape), kept[2 * size :]
            saved = x, None, codes, indices, sums.view(ctx.codes), noise
            grad_x, grad_codebook = by_operator(ctx, saved, grad, None, None)
        return grad_x, grad_codebook, -grad_x if of_first else None, None, None, None, None


def _through_noise(ctx: Any, kept: Tensor, indices: Tensor, noise: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the codebook, by one call for all rows."""
    plan, grad_x, grad_codebook = ctx.plan, empty_like(noise), torch.empty(*ctx.codes, dtype=ctx.computed, device="cpu")
    array, at, step = BackwardArray.from_buffer_copy(plan.backward), kept.data_ptr(), noise.nbytes
    rows_in = ctypes.c_int64(ctx.rows_in)
    array[2], array[5], array[6], array[7], array[9] = at, at + step, indices.data_ptr(), grad.data_ptr(), ctx.codes[0]
    array[16], array[17], array[18] = ctypes.addressof(rows_in), at + 2 * step, grad_x.data_ptr()
    array[19], array[22] = grad_codebook.data_ptr(), noise.data_ptr()
    plan.call_backward(ctypes.addressof(array))
    return grad_x, grad_codebook


def gradient_step(
    x: Tensor, codebook: Tensor, plan: Plan, rows: Tensor | None, usage: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`lamkernels.steps.gradient_step`."""
    constant: list[Tensor] = []
    quantized, codes = apply(GradientStep, x, codebook, plan, rows, usage, constant)
    return quantized, codes, constant[0]


class GradientStep(torch.autograd.Function):
    """x, codebook -> x + (codes − x), codes; puts the indices into ``constant`` and adds to ``usage``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, plan: Plan, rows: Tensor | None, usage: Tensor | None,
        constant: list[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        through = empty_like(x)
        settings = {THROUGH: through.data_ptr()}
        if usage is not None:
            settings |= {GROUPS_USED: usage.data_ptr(), GROUPS_USED + 1: plan.indices.shape[1:].numel()}
        codes, indices, _, rows_in = forward(x, codebook, plan, (rows, None, None), NOTHING, settings)
        visible = visible_indices(indices, rows_in)
        constant.append(visible)
        ctx.num_codes = codebook.shape[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(visible)
        return through, codes

    @staticmethod
    def backward(ctx: Any, grad_through: Tensor | None, grad_codes: Tensor | None) -> Any:
        grad_codebook = None
        if grad_codes is not None and ctx.needs_input_grad[1]:
            (indices,) = ctx.saved_tensors
            grad_codebook = torch.ops.aten.embedding_dense_backward(grad_codes, indices, ctx.num_codes, -1, False)
        return grad_through, grad_codebook, None, None, None, None


def plan_of_maps(
    shape: tuple[int, int, int, int], dtype: torch.dtype, num_codes: int, averaging: tuple[float, float]
) -> Plan | None:
    """For contiguous maps of (batch, codebooks, D, places) and as many codebooks; quantized is laid out as they are."""
    batch, books, dim, places = shape
    strides = Strides(dim * places, 1, places, books * dim * places, places)
    rows = torch.Size((books, batch, places, dim))
    codes = torch.Size((books, num_codes, dim))
    return plan(rows, strides, dtype, codes, dtype, "l2", "default", "ste", averaging, True)


def map_step(
    x: Tensor, codebook: Tensor, averages: tuple[Tensor, Tensor] | None, plan: Plan, commitment: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lamkernels.steps.map_step`."""
    constant: list[Tensor] = []
    quantized, loss = apply(MapStep, x, codebook, averages, plan, commitment, constant)
    perplexity, indices = constant
    return quantized, loss, perplexity, indices


class MapStep(torch.autograd.Function):
    """x -> quantized, weighted commitment loss; puts perplexity and indices into ``constant``, and updates codebook and
    averages.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, averages: tuple[Tensor, Tensor] | None, plan: Plan, commitment: float,
        constant: list[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        perplexity, loss = empty_loss(codebook), empty_loss(codebook)
        settings = {PERPLEXITY: perplexity.data_ptr(), LOSS_WEIGHT: bits(commitment)}
        if averages is not None:
            settings |= averages_in(*averages, codebook)
            settings[LAPO_AVERAGES] = 1
        quantized, indices, _, rows_in = forward(
            x, codebook, plan, (None, None, None), (None, None, None, loss), settings
        )
        if averages is not None and not codebook.is_inference():
            torch.autograd.graph.increment_version((codebook, *averages))  # autograd notices the update by it
        visible = visible_indices(indices, rows_in)
        constant += perplexity, visible
        ctx.plan, ctx.commitment = plan, commitment
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, quantized, visible)
        return quantized, loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_loss: Tensor | None) -> Any:
        x, quantized, indices = ctx.saved_tensors
        saved_in_place = x.is_contiguous() and quantized.is_contiguous() and indices.is_contiguous()
        if grad_loss is None:
            grad_x = grad
        elif grad is not None and grad.is_contiguous() and saved_in_place and is_ordinary(grad, grad_loss):
            grad_x = _pull_to_codes(ctx, x, quantized, indices, grad, grad_loss)
        else:
            pull = (x - quantized) * (grad_loss * (2 * ctx.commitment / x.numel()))
            grad_x = pull if grad is None else grad + pull
        return grad_x, None, None, None, None, None


def _pull_to_codes(ctx: Any, x: Tensor, quantized: Tensor, indices: Tensor, grad: Tensor, grad_loss: Tensor) -> Tensor:
    """grad + 2 · commitment · (x − quantized) / numel · grad_loss: entry by entry, so rows of memory will do."""
    dim = ctx.plan.dim
    grad_x, rows, chunk = empty_like(x), x.numel() // dim, max(1, BACKWARD_CHUNK // dim)
    array = BackwardArray.from_buffer_copy(ctx.plan.backward)
    array[2], array[5], array[6] = x.data_ptr(), quantized.data_ptr(), indices.data_ptr()
    array[7], array[8], array[9], array[11], array[12], array[13] = grad.data_ptr(), rows, 0, 0, dim, 1
    array[14], array[15] = grad_loss.data_ptr(), ZERO[x.dtype].data_ptr()
    rows_in = ctypes.c_int64(rows)
    array[16], array[18], array[20] = ctypes.addressof(rows_in), grad_x.data_ptr(), 1
    array[LOSS_WEIGHTS] = bits(ctx.commitment)
    run(ctx.plan.kernel_backward, ctypes.addressof(array), -(-rows // chunk) + 1, 4 * x.numel())
    return grad_x
