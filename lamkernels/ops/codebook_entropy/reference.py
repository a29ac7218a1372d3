"""The specification of codebook_entropy and of its backward, in fp64, a few rows times all codes at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ENTRIES = 1 << 20  # of rows times codes that are held at once


def codebook_entropy(x: Tensor, indices: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """H(mean_n p_n) with p_n(k) = Π_d σ(±4βs·x_nd), + where bit d of k is set; the first entry is the highest bit."""
    count = (indices >= 0).sum(-1).clamp(min=1)[:, None]  # (H, 1)
    mean = sum(p.sum(1) for _, _, p in _blocks(x, indices, logit_scale)) / count
    mean = torch.zeros(x.shape[0], 2 ** x.shape[-1], dtype=torch.float64, device=x.device) + mean
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return -torch.special.xlogy(mean, mean).sum(-1).to(dtype), mean.to(dtype)


def codebook_entropy_backward(
    x: Tensor, indices: Tensor, probabilities: Tensor, grad_entropy: Tensor, logit_scale: float
) -> Tensor:
    """dx_nd = −g · 4βs / n · Σ_k log p(k) · p_n(k) · (1 − σ_nd where bit d of k is set, else −σ_nd)."""
    log_mean = probabilities.double().clamp(min=torch.finfo(torch.float32).tiny).log()[:, None]  # (H, 1, K)
    weight = -grad_entropy.double() * logit_scale / (indices >= 0).sum(-1).clamp(min=1)
    grad_x = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for rows, logit, p in _blocks(x, indices, logit_scale):
        t = p * log_mean  # (H, n, K)
        set_bits, other_bits = t @ _bits(x), t @ (1 - _bits(x))
        grad_x[:, rows] = weight[:, None, None] * ((-logit).sigmoid() * set_bits - logit.sigmoid() * other_bits)
    return grad_x.to(x.dtype)


def _bits(x: Tensor) -> Tensor:
    """(K, D): the bits of every code, the highest first."""
    shift = torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)
    return (torch.arange(2 ** x.shape[-1], device=x.device)[:, None] >> shift & 1).double()


def _blocks(x: Tensor, indices: Tensor, logit_scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their logits (H, n, D) and code distributions (H, n, K), 0 for rows that are not in."""
    inside, bits, size = (indices >= 0)[..., None], _bits(x), max(1, ENTRIES // max(1, x.shape[0] << x.shape[-1]))
    logits = logit_scale * x.double().masked_fill(~inside, 0.0)
    for start in range(0, x.shape[1], size):
        rows = slice(start, start + size)
        logit = logits[:, rows, None]  # (H, n, 1, D)
        p = torch.where(bits > 0, logit.sigmoid(), (-logit).sigmoid()).prod(-1)
        yield rows, logits[:, rows], p * inside[:, rows]
