"""The specification of lookup_free_quantize and of its backward, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def lookup_free_quantize(
    x: Tensor, mask: Tensor | None, scale: float, logit_scale: float, keep_zero: bool
) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.lookup_free_quantize`. ``x`` (H, N, D), ``mask`` (H, N) bool or None, 4βs."""
    kept = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    inside = kept & x.isfinite().all(-1)  # (H, N)
    wide = x.double().masked_fill(~inside[..., None], 0.0)
    code = _code(wide, scale, keep_zero)
    bits = 2 ** torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)
    indices = ((wide > 0) * bits).sum(-1).where(inside, -1)
    quantized = code.masked_fill(~inside[..., None], torch.nan).masked_fill(~kept[..., None], 0.0).to(x.dtype)
    logit = (logit_scale * wide).abs().clamp(max=1000.0)
    # H(σ(a)) = log(1 + e^−a) + a σ(−a)
    entropy = (softplus(-logit) + logit * (-logit).sigmoid()) * inside[..., None]
    commitment = (wide - code).square() * inside[..., None]
    num_rows = inside.sum(-1)
    count = num_rows.clamp(min=1)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    losses = commitment.sum((1, 2)) / (count * x.shape[-1]), entropy.sum((1, 2)) / count
    return quantized, indices, *(loss.to(dtype) for loss in losses), num_rows


def lookup_free_quantize_backward(
    x: Tensor, indices: Tensor, num_rows: Tensor, grad_quantized: Tensor | None, grad_commitment: Tensor,
    grad_entropy: Tensor, scale: float, logit_scale: float, keep_zero: bool,
) -> Tensor:  # fmt: skip
    """dx = g_q + g_c · 2 (x − q) / (n·D) − g_e · 4βs · a p(1 − p) / n, a = 4βs·x, p = σ(a); 0 for rows not in."""
    wide, count = x.double(), num_rows.clamp(min=1)[:, None, None]
    logit = (logit_scale * wide).clamp(-1000.0, 1000.0)
    grad = grad_commitment.double()[:, None, None] * 2 * (wide - _code(wide, scale, keep_zero)) / (count * x.shape[-1])
    grad -= grad_entropy.double()[:, None, None] * logit_scale * logit * logit.sigmoid() * (-logit).sigmoid() / count
    grad = grad if grad_quantized is None else grad + grad_quantized.double()
    return grad.masked_fill((indices < 0)[..., None], 0.0).to(x.dtype).contiguous()


def _code(x: Tensor, scale: float, keep_zero: bool) -> Tensor:
    return scale * torch.where(x > 0, 1.0, torch.where((x == 0) & keep_zero, 0.0, -1.0)).to(x.dtype)
