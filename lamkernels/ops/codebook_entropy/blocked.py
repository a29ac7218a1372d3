"""The mean code distribution as matrix products of two halves of the bits: what every fast backend runs.

A row's distribution over 2^D codes is the product of its distributions over the 2^(D/2) values of the first and of the
second half of the bits, so the sum over rows is A·Bᵀ, a matrix product of (2^(D/2), n) factors: no N × 2^D matrix, and
the speed of the vendor's library. Memory is O(2^D) and a block of rows of the factors; work is 2·N·2^D operations
forward, and twice that backward, which forms the factors again.

Rows are the last axis here, so that the loops over them are over neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ENTRIES = 1 << 21  # of one factor that are held at once
MAX_ROWS = 8192  # fp32 sums over a block, fp64 across blocks


def codebook_entropy(x: Tensor, indices: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Entropy (H,) of the mean code distribution, and that distribution (H, 2^D); fp32, or fp64 for fp64 x."""
    heads, _, dim = x.shape
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    first = dim // 2
    mean = torch.zeros((heads, 2**first, 2 ** (dim - first)), dtype=torch.float64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for _, _, left, right in _blocks(x, indices, logit_scale, computed):
            mean += left @ right.transpose(1, 2)
    mean = mean.flatten(1) / (indices >= 0).sum(-1).clamp(min=1)[:, None]
    return -torch.special.xlogy(mean, mean).sum(-1).to(computed), mean.to(computed)


def codebook_entropy_backward(
    x: Tensor, indices: Tensor, probabilities: Tensor, grad_entropy: Tensor, logit_scale: float
) -> Tensor:
    """dx = g · 4βs / n · σ(a) σ(−a) · (E[w | bit set] − E[w | bit clear]), w = −log p of the mean distribution.

    With the bits of one half fixed, the mean of w over the other half is one matrix product for all of its codes.
    """
    dim, computed = x.shape[-1], probabilities.dtype
    first = dim // 2
    surprise = -probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
    # any constant has no effect; less its mean, the weights cancel least
    surprise = surprise - (surprise * probabilities).sum(-1, keepdim=True)
    surprise = surprise.unflatten(1, (2**first, 2 ** (dim - first)))  # type: ignore[no-untyped-call]
    weight = grad_entropy.double() * logit_scale / (indices >= 0).sum(-1).clamp(min=1)
    weight = weight.to(computed)[:, None, None]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.autocast(x.device.type, enabled=False):
        for rows, logits, left, right in _blocks(x, indices, logit_scale, computed):
            parts = left * (surprise @ right), right * (surprise.transpose(1, 2) @ left)  # (H, 2^half, n)
            slope = torch.cat([_along_bits(part, logit) for part, logit in zip(parts, logits, strict=True)], 1)
            grad_x[:, rows] = (weight * slope).to(x.dtype).transpose(1, 2)
    return grad_x


def _blocks(
    x: Tensor, indices: Tensor, logit_scale: float, computed: torch.dtype
) -> Iterator[tuple[slice, tuple[Tensor, Tensor], Tensor, Tensor]]:
    """Rows, the logits (H, d, n) of both halves of their bits, and their distributions (H, 2^d, n) over the values."""
    heads, rows, dim = x.shape
    inside, first = (indices >= 0)[:, None], dim // 2
    size = min(MAX_ROWS, max(1, ENTRIES // (max(heads, 1) << (dim - first))))
    for start in range(0, rows, size):
        block = slice(start, start + size)
        present = inside[..., block]
        logits = x[:, block].to(computed).transpose(1, 2).masked_fill(~present, 0.0).contiguous() * logit_scale
        left, right = logits[:, :first], logits[:, first:]
        weight = present.to(computed)  # rows that are not in have no probability
        yield block, (left, right), _distribution(left, weight), _distribution(right, torch.ones_like(weight))


def _distribution(logits: Tensor, start: Tensor) -> Tensor:
    """Probabilities (H, 2^d, n) of the values of d independent bits, the first the highest, times ``start``."""
    for d in range(logits.shape[1]):
        logit = logits[:, d, None]
        pair = start.new_empty((start.shape[0], start.shape[1], 2, start.shape[2]))
        # both by a sigmoid: 1 − p would lose a small probability
        torch.mul(start, (-logit).sigmoid(), out=pair[:, :, 0])
        torch.mul(start, logit.sigmoid(), out=pair[:, :, 1])
        start = pair.flatten(1, 2)
    return start


def _along_bits(part: Tensor, logits: Tensor) -> Tensor:
    """σ(−a_d) Σ part over values with bit d − σ(a_d) Σ part over values without it: (H, d, n)."""
    dim = logits.shape[1]
    shift = torch.arange(dim - 1, -1, -1, device=part.device)
    bits = (torch.arange(2**dim, device=part.device) >> shift[:, None] & 1).to(part.dtype)
    return (-logits).sigmoid() * (bits @ part) - logits.sigmoid() * ((1 - bits) @ part)
