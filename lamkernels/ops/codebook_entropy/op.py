"""Registration of ``lamkernels::codebook_entropy``; its backward needs the rows and the mean distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamkernels.ops.registration import register, register_backward, register_gradient


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # int(): the number of codes is never a symbol
    codes = 2 ** int(x.shape[-1])
    return x.new_empty(x.shape[:1], dtype=dtype), x.new_empty((x.shape[0], codes), dtype=dtype)


# x (H, N, D), indices (H, N) int64, −1 for rows that are not in, 4βs ->
#   entropy (H,), probabilities (H, 2^D): the mean code distribution. fp32, or fp64 for fp64 x.
codebook_entropy = register(
    "codebook_entropy",
    "codebook_entropy",
    "(Tensor x, Tensor indices, float logit_scale, str backend) -> (Tensor, Tensor)",
    _fake_forward,
)

# -> grad_x (H, N, D) in x.dtype
codebook_entropy_backward = register_backward(
    "codebook_entropy_backward",
    "codebook_entropy",
    "(Tensor x, Tensor indices, Tensor probabilities, Tensor grad_entropy, float logit_scale, str backend) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, indices, ctx.logit_scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, indices, output[1])


def _backward(ctx: Any, grad_entropy: Tensor, _probabilities: None) -> tuple[Tensor | None, ...]:
    grad_x = codebook_entropy_backward(*ctx.saved_tensors, grad_entropy, ctx.logit_scale, ctx.backend)
    return grad_x, None, None, None


register_gradient("codebook_entropy", _backward, _setup_context)
