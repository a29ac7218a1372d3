"""Registration of ``lamkernels::finite_scalar_quantize`` and of its backward, which needs x and which rows are in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamkernels.ops.registration import register, register_backward, register_gradient

# x (H, N, D), D levels -> quantized (H, N, D) in x.dtype, indices (H, N) int64
finite_scalar_quantize = register(
    "finite_scalar_quantize",
    "finite_scalar_quantize",
    "(Tensor x, int[] levels, int rounding, str backend) -> (Tensor, Tensor)",
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64)),
)

# -> grad_x (H, N, D) in x.dtype
finite_scalar_quantize_backward = register_backward(
    "finite_scalar_quantize_backward",
    "finite_scalar_quantize",
    "(Tensor x, Tensor indices, Tensor grad_quantized, int[] levels, int rounding, str backend) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.levels, ctx.rounding, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1])


def _backward(ctx: Any, grad_quantized: Tensor, _indices: None) -> tuple[Tensor | None, ...]:
    x, indices = ctx.saved_tensors
    grad_x = finite_scalar_quantize_backward(x, indices, grad_quantized, ctx.levels, ctx.rounding, ctx.backend)
    return grad_x, None, None, None


register_gradient("finite_scalar_quantize", _backward, _setup_context)
