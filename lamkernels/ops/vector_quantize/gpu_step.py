"""A training step of VectorQuantize whose kernels update the moving averages: what backends "triton" and "cuda" share.

Each has ``fits(num_codes, dim, device)``, which says whether it serves a codebook, ``TYPES`` of rows, and
``step_forward`` and ``step_backward``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


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
    step: tuple[Tensor, Tensor, Tensor] = _EmaStep.apply(x, kernels, averages, precision, rates, weight)  # type: ignore[no-untyped-call]
    return step


class _EmaStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernels: Any, averages: tuple[Tensor, Tensor, Tensor], precision: str,
        rates: tuple[float, float], weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        quantized, indices = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64)
        loss, num_rows = x.new_empty((), dtype=torch.float32), x.new_empty((1,), dtype=torch.int64)
        flat = quantized.view(1, x.shape[:-1].numel(), x.shape[-1]), indices.view(1, x.shape[:-1].numel())
        kernels.step_forward(_rows(x), precision, Step(*flat, loss.view(1), num_rows, averages, rates, weight))
        torch.autograd.graph.increment_version(averages)  # autograd notices the update by it
        ctx.save_for_backward(x, quantized, num_rows)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.weight = kernels, weight
        return quantized, indices, loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("this step has no second derivative: do not differentiate with create_graph=True")
        x, quantized, num_rows = ctx.saved_tensors
        grad_quantized, _, grad_loss = grads
        flat = 1, x.shape[:-1].numel(), x.shape[-1]
        grad_x = x.new_empty(x.shape)
        ctx.kernels.step_backward(
            _rows(x), quantized.view(flat), num_rows,
            None if grad_quantized is None else grad_quantized.reshape(flat),
            num_rows.new_zeros(1, dtype=torch.float32) if grad_loss is None else grad_loss.reshape(1), grad_x,
            ctx.weight,
        )  # fmt: skip
        return grad_x, None, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    from lamkernels.one_call import rows_in_groups

    return rows_in_groups(x.detach().unsqueeze(0))
