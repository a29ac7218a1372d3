"""Registration of ``lamkernels::lookup_free_quantize`` and of its backward, which needs x and which rows are in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamkernels.ops.registration import register, register_backward, register_gradient


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
        x.new_empty(x.shape[:1], dtype=dtype),
        x.new_empty(x.shape[:1], dtype=dtype),
        x.new_empty(x.shape[:1], dtype=torch.int64),
    )


# x (H, N, D), mask (H, N) bool or None, s, 4βs, whether a zero stays zero ->
#   quantized (H, N, D) in x.dtype, indices (H, N) int64, commitment_loss (H,), sample_entropy (H,),
#   num_rows (H,) int64: the rows that are in. Losses are fp32, or fp64 for fp64 x.
lookup_free_quantize = register(
    "lookup_free_quantize",
    "lookup_free_quantize",
    "(Tensor x, Tensor? mask, float scale, float logit_scale, bool keep_zero, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)

# -> grad_x (H, N, D) in x.dtype
lookup_free_quantize_backward = register_backward(
    "lookup_free_quantize_backward",
    "lookup_free_quantize",
    "(Tensor x, Tensor indices, Tensor num_rows, Tensor? grad_quantized, Tensor grad_commitment, "
    "Tensor grad_entropy, float scale, float logit_scale, bool keep_zero, str backend) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, ctx.scale, ctx.logit_scale, ctx.keep_zero, ctx.backend = inputs
    _, indices, _, entropy, num_rows = output
    ctx.mark_non_differentiable(indices, num_rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, indices, num_rows)
    ctx.dtype = entropy.dtype


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, indices, num_rows = ctx.saved_tensors
    losses = (torch.zeros_like(num_rows, dtype=ctx.dtype) if grad is None else grad for grad in (grads[2], grads[3]))
    grad_x = lookup_free_quantize_backward(
        x, indices, num_rows, grads[0], *losses, ctx.scale, ctx.logit_scale, ctx.keep_zero, ctx.backend
    )
    return grad_x, None, None, None, None, None


register_gradient("lookup_free_quantize", _backward, _setup_context)
