"""The entropies of code distributions with the logarithm clamped, as other implementations compute them."""

from __future__ import annotations

import torch
from torch import Tensor


def over_all_codes(x: Tensor, codebook: Tensor, inv_temperature: float, smallest: float) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.lookup_free.clamped_entropies`. In the dtype of x, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        p = (2 * inv_temperature * (x @ codebook.to(x.dtype).T)).softmax(-1)
    return clamped_entropy(p, smallest).mean(), clamped_entropy(p.mean(0), smallest).mean()


def clamped_entropy(p: Tensor, smallest: float) -> Tensor:
    """−Σ p log max(p, ε) of distributions (..., K)."""
    return -(p * p.clamp(min=smallest).log()).sum(-1)
