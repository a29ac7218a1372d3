"""The specification of finite_scalar_quantize and of its backward, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from lamkernels.ops.finite_scalar_quantize.levels import bound, strides


def finite_scalar_quantize(x: Tensor, levels: list[int], rounding: int) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.finite_scalar_quantize`. ``x`` (H, N, D)."""
    finite = x.isfinite().all(-1)  # (H, N)
    quantized = torch.empty_like(x, memory_format=torch.contiguous_format)
    indices = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    for d, (count, stride) in enumerate(zip(levels, strides(tuple(levels)), strict=True)):
        column = bound(count, rounding)
        edges = torch.tensor(column.thresholds, dtype=torch.float64, device=x.device)
        position = torch.bucketize(x[..., d].double().contiguous(), edges, right=True)  # how many are at or below x
        quantized[..., d] = ((position.double() - column.offset) / column.half_width).to(x.dtype)
        indices += position * stride
    return quantized.masked_fill(~finite[..., None], torch.nan), indices.where(finite, -1)


def finite_scalar_quantize_backward(
    x: Tensor, indices: Tensor, grad_quantized: Tensor, levels: list[int], rounding: int
) -> Tensor:
    """dx = g · slope · (1 − tanh²(x + shift)), 0 for rows that are not finite."""
    bounds = [bound(count, rounding) for count in levels]
    slope = torch.tensor([b.slope for b in bounds], dtype=torch.float64, device=x.device)
    shift = torch.tensor([b.shift for b in bounds], dtype=torch.float64, device=x.device)
    grad = grad_quantized.double() * slope / (x.double() + shift).cosh().square()
    return grad.masked_fill((indices < 0)[..., None], 0.0).to(x.dtype).contiguous()
