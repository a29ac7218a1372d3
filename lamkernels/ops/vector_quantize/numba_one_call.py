"""vector_quantize in eager mode as one compiled call: lookup, output, losses, statistics and, if asked, the EMA update.

At the sizes latent action models train with, calls cost more than arithmetic. This is :mod:`numba`'s forward and
backward, to the same bits, under an autograd function instead of the dispatcher: what all calls of one shape have in
common is planned once (:mod:`numba_plan`), and a call only fills in addresses. No vmap and no compilation, so it serves
plain eager mode.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamkernels.eager import apply, is_ordinary
from lamkernels.ops.code_statistics.numba import sum_rows
from lamkernels.ops.nearest_code.numba import LOOKUP, Strides, row_strides
from lamkernels.ops.parallel import MIN_WORK_PER_THREAD, ZERO, bits, empty_like, run
from lamkernels.ops.vector_quantize.numba import QUANTIZE
from lamkernels.ops.vector_quantize.numba_backward import LOSS_WEIGHTS
from lamkernels.ops.vector_quantize.numba_plan import (
    AVERAGES,
    CODEBOOK_LOSS,
    LOSS_WEIGHT,
    BackwardArray,
    ForwardArray,
    Plan,
    plan,
)
from lamkernels.ops.vector_quantize.op import vector_quantize_backward

__all__ = ["plan", "quantize", "row_strides", "train_step", "weighted_step"]

CODES, RESIDUAL_SUMS = LOOKUP + 15, LOOKUP + 10
KEPT = 1 << 20  # bytes of scratch that a thread keeps for its next call


class Scratch:
    """Memory that no call finds as it left it: the next one need not ask for it."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, int]] = []

    def take(self, size: int) -> tuple[Any, int]:
        """Memory of at least so many bytes and its address; nobody else's, of another thread or a signal handler."""
        try:
            kept = self.kept.pop()
        except IndexError:
            kept = None
        if kept is None or kept[0].size < size:
            memory = np.empty(size, np.uint8)
            kept = memory, memory.ctypes.data
        return kept

    def give_back(self, taken: tuple[Any, int]) -> None:
        """Keeps it for the next call, unless it is large."""
        if taken[0].size <= KEPT:
            self.kept.append(taken)


scratch = Scratch()
Extras = tuple[Tensor | None, Tensor | None, Tensor | None]
Wanted = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NOTHING: Wanted = (None, None, None, None)


def forward(
    x: Tensor, codebook: Tensor, plan: Plan, extras: Extras, wanted: Wanted, settings: Mapping[int, int]
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Runs the plan.

    Args:
        x: (..., D).
        codebook: (K, D) or (H, K, D), contiguous.
        plan: for these.
        extras: the rows of x in place where x is not contiguous, mask, noise; None for what a call has not.
        wanted: where counts, sums, residual sums and the losses go; None for one that nobody wants.
        settings: parameters that this call has beyond the plan, by their place.

    Returns:
        quantized, indices, the codes where they are not ``quantized`` and have no place in ``settings``, and how many
        rows are in.
    """
    (rows, mask, noise), stored, codes = extras, x.dtype, None
    quantized, indices = empty_like(x), torch.empty_like(plan.indices, memory_format=torch.contiguous_format)
    stored_codes = codebook if stored == codebook.dtype else codebook.to(stored)
    taken = scratch.take(plan.scratch)
    base = taken[1]
    array = ForwardArray.from_buffer_copy(plan.forward)
    array[2], array[5], array[17] = (x if rows is None else rows).data_ptr(), codebook.data_ptr(), indices.data_ptr()
    array[LOOKUP], array[LOOKUP + 1] = quantized.data_ptr(), stored_codes.data_ptr()
    if mask is not None:
        array[LOOKUP + 3] = mask.data_ptr()
    if noise is not None:
        array[LOOKUP + 14] = noise.data_ptr()
        if CODES not in settings:
            codes = empty_like(x)
            array[CODES] = codes.data_ptr()
    places = [base + at for at in plan.unwanted]
    if wanted is not NOTHING:
        places = [at if tensor is None else tensor.data_ptr() for tensor, at in zip(wanted, places, strict=True)]
    array[LOOKUP + 8], array[LOOKUP + 9], array[LOOKUP + 10], loss = places
    array[QUANTIZE], array[QUANTIZE + 1], array[QUANTIZE + 3] = loss, loss, base
    for place, value in settings.items():
        array[place] = value
    address = ctypes.addressof(array)
    if plan.tasks > 1 and plan.work >= MIN_WORK_PER_THREAD:
        array[QUANTIZE + 5] = 0
        plan.call(address)
        array[QUANTIZE + 4], array[QUANTIZE + 5] = 0, 1
        run(plan.kernel, address, plan.tasks, plan.work)
    else:
        plan.call(address)
    scratch.give_back(taken)
    return quantized, indices, codes, array[QUANTIZE + 2]


def visible_indices(indices: Tensor, rows_in: int) -> Tensor:
    """As a module returns them: 0 for the rows that are not in."""
    return indices if rows_in == indices.numel() else indices.clamp(min=0)


def averages_in(sizes: Tensor, code_sums: Tensor, codebook: Tensor) -> dict[int, int]:
    """The settings of an EMA update."""
    buffers = sizes, code_sums, codebook
    return {AVERAGES + i: buffer.data_ptr() for i, buffer in enumerate(buffers)}


def empty_loss(codebook: Tensor) -> Tensor:
    """Room for a number () in the dtype of the codebook."""
    return torch.empty_like(ZERO[codebook.dtype])


def quantize(x: Tensor, codebook: Tensor, plan: Plan, extras: Extras) -> tuple[Tensor, ...]:
    """quantized, indices, both losses, counts and sums, as :func:`lamkernels.vector_quantize` returns them."""
    if torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad):
        return apply(Quantize, x, codebook, plan, *extras)  # type: ignore[no-any-return]
    return _quantize(x, codebook, plan, extras)[0]


def train_step(
    x: Tensor, codebook: Tensor, sizes: Tensor, code_sums: Tensor, plan: Plan, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """quantized, indices (0 where a row is not finite) and commitment loss; updates the three EMA buffers in place."""
    if x.requires_grad and torch.is_grad_enabled():
        return apply(TrainStep, x, codebook, sizes, code_sums, plan, rows)  # type: ignore[no-any-return]
    return _train_step(x, codebook, sizes, code_sums, plan, rows)[0]


def weighted_step(
    x: Tensor, codebook: Tensor, plan: Plan, rows: Tensor | None, weights: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """quantized, indices (0 where a row is not finite) and the weighted sum of the commitment and codebook loss.

    x is contiguous, of any shape whose entries are those of the planned rows, or has them in ``rows``; (b, D, ...) for
    a plan of :func:`plan_of_channels`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad):
        constant: list[Tensor] = []  # what has no gradient costs less past the autograd function than through it
        quantized, loss = apply(WeightedStep, x, codebook, plan, rows, weights, constant)
        return quantized, constant[0], loss
    return _weighted_step(x, codebook, plan, rows, weights)[0]


def _quantize(x: Tensor, codebook: Tensor, plan: Plan, extras: Extras) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    counts = codebook.new_empty(codebook.shape[:-1], dtype=torch.int64)
    sums, residual_sums = torch.empty_like(codebook), torch.empty_like(codebook)
    loss, codebook_loss = empty_loss(codebook), empty_loss(codebook)
    quantized, indices, codes, rows_in = forward(
        x, codebook, plan, extras, (counts, sums, residual_sums, loss), {CODEBOOK_LOSS: codebook_loss.data_ptr()}
    )
    return (quantized, indices, loss, codebook_loss, counts, sums), (residual_sums, codes, rows_in)


def _train_step(
    x: Tensor, codebook: Tensor, sizes: Tensor, code_sums: Tensor, plan: Plan, rows: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, int]:
    averages, loss = averages_in(sizes, code_sums, codebook), empty_loss(codebook)
    quantized, indices, _, rows_in = forward(x, codebook, plan, (rows, None, None), (None, None, None, loss), averages)
    if not codebook.is_inference():
        torch.autograd.graph.increment_version((codebook, sizes, code_sums))  # autograd notices the update by it
    visible = visible_indices(indices, rows_in)
    return (quantized, visible, loss), indices, rows_in


def _weighted_step(
    x: Tensor, codebook: Tensor, plan: Plan, rows: Tensor | None, weights: tuple[float, float]
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, int]]:
    residual_sums, loss = torch.empty_like(codebook), empty_loss(codebook)
    quantized, indices, _, rows_in = forward(
        x, codebook, plan, (rows, None, None), (None, None, residual_sums, loss), {LOSS_WEIGHT: bits(sum(weights))}
    )
    visible = visible_indices(indices, rows_in)
    return (quantized, visible, loss), (indices, residual_sums, rows_in)


def plan_of_channels(shape: torch.Size, dtype: torch.dtype, codes: torch.Size) -> Plan | None:
    """For contiguous x (b, D, ...) and a codebook (K, D) of its dtype: quantized is laid out as x."""
    batch, dim, places = shape[0], shape[1], shape[2:].numel()
    strides = Strides(batch * dim * places, 1, places, dim * places, places)
    rows = torch.Size((batch, places, dim))
    return plan(rows, strides, dtype, codes, dtype, "l2", "default", "ste", None, True)


class Quantize(torch.autograd.Function):
    """x (..., D), codebook -> quantized, indices, commitment loss, codebook loss, counts, sums."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codebook: Tensor,
        plan: Plan,
        rows: Tensor | None,
        mask: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, (residual_sums, codes, ctx.rows_in) = _quantize(x, codebook, plan, (rows, mask, noise))
        quantized, indices, _, _, counts, sums = outputs
        constant = (indices, counts, sums)
        ctx.mark_non_differentiable(*constant, *([quantized] if plan.options[1] == "none" else []))
        ctx.plan, ctx.computed = plan, codebook.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, rows, quantized if codes is None else codes, indices, residual_sums, noise)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return *gradient(ctx, grads[0], grads[2], grads[3]), None, None, None, None


class WeightedStep(torch.autograd.Function):
    """x, codebook -> quantized as x, commitment_weight · commitment loss + codebook_weight · codebook loss; the indices
    go into ``constant``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, plan: Plan, rows: Tensor | None, weights: tuple[float, float],
        constant: list[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        outputs, (indices, residual_sums, ctx.rows_in) = _weighted_step(x, codebook, plan, rows, weights)
        quantized, visible, loss = outputs
        constant.append(visible)
        ctx.plan, ctx.computed, ctx.weights = plan, codebook.dtype, weights
        if plan.options[1] == "none":
            ctx.mark_non_differentiable(quantized)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, rows, quantized, indices, residual_sums, None)
        return quantized, loss

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor | None, grad_loss: Tensor | None) -> Any:
        return *gradient(ctx, grad_quantized, grad_loss, grad_loss, ctx.weights), None, None, None, None


class TrainStep(torch.autograd.Function):
    """x (..., D) -> quantized (..., D), indices (...,), commitment loss (); updates the three EMA buffers in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, sizes: Tensor, code_sums: Tensor, plan: Plan, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs, indices, ctx.rows_in = _train_step(x, codebook, sizes, code_sums, plan, rows)
        quantized, visible, _ = outputs
        ctx.plan, ctx.computed = plan, codebook.dtype
        ctx.mark_non_differentiable(visible)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, rows, quantized, indices, None, None)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor | None, _: None, grad_loss: Tensor | None) -> Any:
        return gradient(ctx, grad_quantized, grad_loss, None)[0], None, None, None, None, None


def gradient(
    ctx: Any, grad_quantized: Tensor | None, grad_commitment: Tensor | None, grad_codebook_loss: Tensor | None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Of x and of the codebook; ``weights`` of the two losses."""
    grads, saved = (grad_quantized, grad_commitment, grad_codebook_loss), ctx.saved_tensors
    apart = ctx.plan.as_x and ctx.rows_in < ctx.plan.indices.numel()
    if is_ordinary(*grads) and not apart and _lie_as_planned(ctx.plan, *saved):
        return _in_one_call(ctx, saved, *grads, weights)
    losses = (
        grad if grad is None or weight == 1 else grad * weight for grad, weight in zip(grads[1:], weights, strict=True)
    )
    return by_operator(ctx, saved, grad_quantized, *losses)


def _lie_as_planned(plan: Plan, x: Tensor, rows: Tensor | None, *others: Tensor | None) -> bool:
    """Whether what was saved came back in the layout that it had: hooks on saved tensors may copy."""
    for other in others:
        if other is not None and not other.is_contiguous():
            return False
    return x.is_contiguous() if rows is None else row_strides(rows) == plan.strides


def by_operator(
    ctx: Any,
    saved: Any,
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    grad_codebook_loss: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`gradient` by the registered operator, of what :class:`Quantize` saves."""
    x, _, codes, indices, residual_sums, noise = saved
    heads, dim = ctx.plan.heads, ctx.plan.dim
    if ctx.plan.as_x:
        x, codes = x.movedim(1, -1), codes.movedim(1, -1)
        grad_quantized = None if grad_quantized is None else grad_quantized.movedim(1, -1)
    sums = x.new_zeros((heads, 1, dim), dtype=ctx.computed) if residual_sums is None else residual_sums
    grad_x, grad_codebook = vector_quantize_backward(
        x.reshape(heads, -1, dim), codes.reshape(heads, -1, dim), indices.reshape(heads, -1),
        sums.reshape(heads, -1, dim), indices.new_full((heads,), ctx.rows_in),
        *(None if rows is None else rows.reshape(heads, -1, dim) for rows in (noise, grad_quantized)),
        _of_heads(grad_commitment, heads, ctx.computed).reshape(heads),
        _of_heads(grad_codebook_loss, heads, ctx.computed).reshape(heads), *ctx.plan.options, "numba",
    )  # fmt: skip
    grad_x = grad_x.reshape(x.shape)
    grad_x = grad_x.movedim(-1, 1) if ctx.plan.as_x else grad_x
    return grad_x, None if residual_sums is None else grad_codebook.reshape(residual_sums.shape)


def _in_one_call(
    ctx: Any,
    saved: Any,
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    grad_codebook_loss: Tensor | None,
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor | None]:
    x, rows, codes, indices, residual_sums, noise = saved
    plan, dim = ctx.plan, ctx.plan.dim
    grad_x, grad_codebook, pull = empty_like(x), None, None
    array = BackwardArray.from_buffer_copy(plan.backward)
    array[2], array[5], array[6] = (x if rows is None else rows).data_ptr(), codes.data_ptr(), indices.data_ptr()
    if grad_quantized is not None:
        grad = grad_quantized
        if not grad.is_contiguous():
            grad = grad.reshape(plan.heads, -1, dim)
            if grad.stride(-1) not in (0, 1):
                grad = grad.contiguous()
            array[11], array[12], array[13] = grad.stride()
        array[7] = grad.data_ptr()
        if noise is not None:
            array[22] = noise.data_ptr()
            if residual_sums is None or not ctx.needs_input_grad[1] or not plan.pulls:
                pull = torch.empty(indices.numel(), dim, dtype=ctx.computed, device="cpu")
                array[23] = pull.data_ptr()
    on_rows = _of_heads(grad_commitment, plan.heads, ctx.computed)
    on_codes = on_rows
    if grad_codebook_loss is not grad_commitment:
        on_codes = _of_heads(grad_codebook_loss, plan.heads, ctx.computed)
    array[14], array[15] = on_rows.data_ptr(), on_codes.data_ptr()
    if weights != (1.0, 1.0):
        array[LOSS_WEIGHTS], array[LOSS_WEIGHTS + 1] = bits(weights[0]), bits(weights[1])
    rows_in = plan.all_rows
    if ctx.rows_in < plan.indices.numel():
        rows_in = (ctypes.c_int64 * plan.heads)(*[ctx.rows_in] * plan.heads)
    array[16], array[18] = ctypes.addressof(rows_in), grad_x.data_ptr()
    if residual_sums is not None and ctx.needs_input_grad[1]:
        grad_codebook = torch.empty_like(residual_sums)
        array[9], array[17], array[19] = residual_sums.shape[-2], residual_sums.data_ptr(), grad_codebook.data_ptr()
    work = 4 * x.numel()
    if work < MIN_WORK_PER_THREAD:
        plan.call_backward(ctypes.addressof(array))
    else:
        run(plan.kernel_backward, ctypes.addressof(array), plan.backward_tasks, work)
    if pull is not None and grad_codebook is not None:
        pulls = grad_codebook.new_empty(plan.heads, *grad_codebook.shape[-2:])
        counts = indices.new_empty(pulls.shape[:2])
        sum_rows(pull.view(plan.heads, -1, dim), indices.view(plan.heads, -1), None, counts, pulls, None)
        grad_codebook -= pulls.view(grad_codebook.shape)
    return grad_x, grad_codebook


def _of_heads(grad: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a loss (), for each head: the loss is a mean over the rows of all heads."""
    if grad is None:
        grad = ZERO[dtype]
    return grad if heads == 1 else grad.repeat(heads)
