"""Training steps of VectorQuantize on a GPU, with everything but rows and codebook inside one autograd function.

One updates the moving averages, for backends "triton" and "cuda": each has ``fits(num_codes, dim, device)``, which says
whether it serves a codebook, ``TYPES`` of rows, and ``step_forward`` and ``step_backward``. The other learns the
codebook by its gradient, for "triton": ``learned_forward`` and ``learned_backward``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamkernels.eager import is_ordinary
from lamkernels.ops.vector_quantize.op import vector_quantize_backward


class Step(NamedTuple):
    """What a step writes, and its numbers.

    Attributes:
        quantized: (1, N, D) as the rows.
        indices: (1, N) int64, 0 for a row that is not finite.
        loss: (1,) float32, weighted.
        num_rows: (1,) int64: the rows that are finite.
        averages: codebook (K, D), cluster_size (K,) and code_sums (K, D), float32 and contiguous; updated.
        rates: decay and ε, as of :class:`lamkernels.VectorQuantize`.
        weight: of the commitment loss.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    num_rows: Tensor
    averages: tuple[Tensor, Tensor, Tensor]
    rates: tuple[float, float]
    weight: float


class Learned(NamedTuple):
    """What a step writes whose codebook is learned by its gradient.

    Attributes:
        quantized: (1, N, D) as the rows.
        indices: (1, N) int64, 0 for a row that is not finite.
        loss: (1,) float32: the sum of both losses, weighted.
        num_rows: (1,) int64: the rows that are finite.
        residual_sums: (1, K, D) float32.
        weights: of the commitment loss and of the codebook loss.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    num_rows: Tensor
    residual_sums: Tensor
    weights: tuple[float, float]


def ema_step(
    kernels: Any, x: Tensor, averages: tuple[Tensor, Tensor, Tensor], precision: str, rates: tuple[float, float],
    weight: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Straight-through quantisation and the update of the codebook.

    Args:
        kernels: the module of a backend.
        x: (..., D).
        averages: this and the rest as of :class:`Step`.
        precision: as for :func:`lamkernels.nearest_code`.
        rates: decay and ε.
        weight: of the commitment loss.

    Returns:
        quantized as x, indices (...,) int64 with 0 for a row that is not finite, and the weighted loss ().
    """
    step: tuple[Tensor, Tensor, Tensor] = _EmaStep.apply(x, kernels, averages, precision, rates, float(weight))  # type: ignore[no-untyped-call]
    return step


def learned_step(
    kernels: Any, x: Tensor, codebook: Tensor, metric: str, precision: str, weights: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through quantisation whose loss reaches rows and codebook.

    Args:
        kernels: the module of a backend.
        x: (..., D).
        codebook: (K, D) float32, contiguous.
        metric: "l2" or "dot".
        precision: as for :func:`lamkernels.nearest_code`.
        weights: of the commitment loss and of the codebook loss.

    Returns:
        As :func:`ema_step`; the loss is the sum of both.
    """
    given = float(weights[0]), float(weights[1])  # a kernel would take an int for a constant
    step: tuple[Tensor, Tensor, Tensor] = _LearnedStep.apply(x, codebook, kernels, metric, precision, given)  # type: ignore[no-untyped-call]
    return step


class _EmaStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernels: Any, averages: tuple[Tensor, Tensor, Tensor], precision: str,
        rates: tuple[float, float], weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        quantized, indices, loss, num_rows = _empty(x)
        kernels.step_forward(
            _rows(x), precision, Step(*_flat(quantized, indices, loss), num_rows, averages, rates, weight)
        )
        torch.autograd.graph.increment_version(averages)  # autograd notices the update by it
        ctx.save_for_backward(x, quantized, num_rows)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.weight = kernels, weight
        return quantized, indices, loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, quantized, num_rows = ctx.saved_tensors
        if not is_ordinary(*grads, device=x.device.type):
            nothing = x.new_zeros((1, 1, x.shape[-1]), dtype=torch.float32)
            grad_x, _ = _by_operator(x, quantized, num_rows, nothing, grads, (ctx.weight, 0.0))
        else:
            grad_x = x.new_empty(x.shape)
            ctx.kernels.step_backward(*_read(x, quantized, num_rows, *grads), grad_x, ctx.weight)
        return grad_x, None, None, None, None, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, kernels: Any, metric: str, precision: str, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss, num_rows = _empty(x)
        residual_sums = codebook.new_empty((1, *codebook.shape))
        step = Learned(*_flat(quantized, indices, loss), num_rows, residual_sums, weights)
        kernels.learned_forward(_rows(x), codebook.unsqueeze(0), metric, precision, step)
        ctx.save_for_backward(x, quantized, num_rows, residual_sums)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.weights = kernels, weights
        return quantized, indices, loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, quantized, num_rows, residual_sums = ctx.saved_tensors
        if not is_ordinary(*grads, device=x.device.type):
            grad_x, grad_codebook = _by_operator(x, quantized, num_rows, residual_sums, grads, ctx.weights)
        else:
            grad_x, grad_codebook = x.new_empty(x.shape), residual_sums.new_empty(residual_sums.shape[1:])
            read = _read(x, quantized, num_rows, *grads)
            ctx.kernels.learned_backward(*read, grad_x, ctx.weights, residual_sums.contiguous(), grad_codebook)
        return grad_x, grad_codebook, None, None, None, None


def _empty(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the quantised rows, the indices, the loss () and the number of rows (1,)."""
    loss, num_rows = x.new_empty((), dtype=torch.float32), x.new_empty((1,), dtype=torch.int64)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64), loss, num_rows


def _flat(quantized: Tensor, indices: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As (1, N, D), (1, N) and (1,)."""
    rows = indices.numel()
    return quantized.view(1, rows, quantized.shape[-1]), indices.view(1, rows), loss.view(1)


def _read(
    x: Tensor, quantized: Tensor, num_rows: Tensor, grad_quantized: Tensor | None, _: Tensor | None,
    grad_loss: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """What a backward reads, flat. Hooks on saved tensors may have changed their layout."""
    flat = 1, x.shape[:-1].numel(), x.shape[-1]
    return (
        _rows(x), quantized.reshape(flat).contiguous(), num_rows,
        None if grad_quantized is None else grad_quantized.reshape(flat),
        num_rows.new_zeros(1, dtype=torch.float32) if grad_loss is None else grad_loss.reshape(1),
    )  # fmt: skip


def _by_operator(
    x: Tensor, quantized: Tensor, num_rows: Tensor, residual_sums: Tensor, grads: tuple[Tensor | None, ...],
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and of the codebook by the registered operator, which has a batching rule and no second
    derivative: for gradients that a kernel cannot read.
    """
    codes, grad_quantized, loss = quantized.detach(), grads[0], grads[2]
    flat = 1, x.shape[:-1].numel(), x.shape[-1]
    indices = torch.where(codes.reshape(flat).isnan().any(-1), -1, 0)
    loss = residual_sums.new_zeros(1) if loss is None else loss.reshape(1)
    grad_x, grad_codebook = vector_quantize_backward(
        x.reshape(flat), codes.reshape(flat), indices, residual_sums, num_rows, None,
        None if grad_quantized is None else grad_quantized.reshape(flat), weights[0] * loss, weights[1] * loss, "l2",
        "ste", "auto",
    )  # fmt: skip
    return grad_x.reshape(x.shape), grad_codebook.squeeze(0)


def _rows(x: Tensor) -> Tensor:
    from lamkernels.one_call import rows_in_groups

    return rows_in_groups(x.unsqueeze(0))  # in an autograd function, so nothing is recorded
