"""Registration of ``lamkernels::code_statistics``: sums are linear in the rows, so the gradient is a gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamkernels.ops.registration import register, register_gradient


def _fake(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    heads, dim = x.shape[0], x.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    counts = x.new_empty((heads, num_codes), dtype=torch.int64)
    return counts, x.new_empty((heads, num_codes, dim), dtype=dtype)


# x (H, N, D), or (H, B, N / B, D) whose rows lie in groups, indices (H, N) int64 ->
#   counts (H, K) int64, sums (H, K, D) fp32, or fp64 for fp64 x
code_statistics = register(
    "code_statistics",
    "code_statistics",
    "(Tensor x, Tensor indices, SymInt num_codes, str backend) -> (Tensor, Tensor)",
    _fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, indices, *_ = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(x, indices)


def _backward(ctx: Any, _counts: None, grad_sums: Tensor) -> tuple[Tensor, None, None, None]:
    x, indices = ctx.saved_tensors
    counted = (indices >= 0) & (indices < grad_sums.shape[1]) & x.isfinite().all(-1).flatten(1)
    safe = indices.where(counted, 0)[..., None].expand(*indices.shape, grad_sums.shape[-1])
    grad = grad_sums.gather(1, safe).masked_fill(~counted[..., None], 0.0)
    return grad.to(x.dtype).view(x.shape), None, None, None


register_gradient("code_statistics", _backward, _setup_context)
