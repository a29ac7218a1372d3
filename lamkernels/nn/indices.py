"""The indices that modules return."""

from __future__ import annotations

import torch
from torch import Tensor


def module_indices(indices: Tensor, mask: Tensor | None) -> Tensor:
    """0 for a row that is not finite, because −1 would trip an embedding in a step that AMP skips; −1 where masked."""
    indices = indices.clamp(min=0)
    return indices if mask is None else torch.where(mask, indices, -1)
