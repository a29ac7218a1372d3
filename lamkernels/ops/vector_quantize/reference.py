"""The specification of vector_quantize and of its backward, accumulated in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from lamkernels.ops.code_statistics.reference import code_statistics
from lamkernels.ops.nearest_code.reference import nearest_code


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str
) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.vector_quantize`. ``x`` (H, N, D), ``codebook`` (H, K, D), ``mask`` (H, N) bool or None.

    A row is *in* when it is finite and not masked. A row that is not finite is quantised to NaN, a masked one to zero.
    """
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    indices, _ = nearest_code(x, codebook, metric, precision, False)
    if mask is not None:
        indices = indices.where(mask, -1)
    inside = indices >= 0  # (H, N)
    gather = indices.clamp(min=0)[..., None].expand(x.shape)
    code = codebook.gather(1, gather).masked_fill(~inside[..., None], torch.nan)
    residual = (x.double() - code.double()).masked_fill(~inside[..., None], 0.0)  # (H, N, D)
    quantized = code.to(x.dtype)
    if mask is not None:
        quantized = quantized.masked_fill(~mask[..., None], 0.0)
    num_rows = inside.sum(-1)
    loss = (residual.square().sum((1, 2)) / (num_rows * x.shape[-1]).clamp(min=1)).to(accumulator)
    counts, residual_sums = code_statistics(residual, indices, codebook.shape[1])
    finite_codes = codebook.double().masked_fill(counts[..., None] == 0, 0.0)  # 0 · NaN would not be 0
    sums = (counts[..., None] * finite_codes + residual_sums).to(accumulator)
    return quantized, indices, loss, loss.clone(), counts, sums, residual_sums.to(accumulator), num_rows


def vector_quantize_backward(
    x: Tensor,
    quantized: Tensor,
    indices: Tensor,
    residual_sums: Tensor,
    num_rows: Tensor,
    grad_quantized: Tensor | None,
    grad_commitment: Tensor,
    grad_codebook_loss: Tensor,
) -> tuple[Tensor, Tensor]:
    """dx = g_q + g_commitment · 2 (x − q) / (n·D), 0 for rows that are not in; dc_k = −g_codebook · 2 R_k / (n·D)."""
    scale = 2.0 / (num_rows * x.shape[-1]).clamp(min=1).to(residual_sums.dtype)  # (H,)
    residual = x.to(residual_sums.dtype) - quantized.to(residual_sums.dtype)
    grad_x = (grad_commitment * scale)[:, None, None] * residual
    if grad_quantized is not None:
        grad_x = grad_x + grad_quantized
    grad_x = grad_x.masked_fill((indices < 0)[..., None], 0.0).to(x.dtype)
    return grad_x, -(grad_codebook_loss * scale)[:, None, None] * residual_sums
