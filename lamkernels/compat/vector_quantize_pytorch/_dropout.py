"""Quantiser dropout: how many of the residual quantisers a training step uses."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from lamkernels.compat.vector_quantize_pytorch import _processes


def seed(device: torch.device, needed: bool = True) -> int | None:
    """Upstream's seed of a step: one draw from torch's generator, summed over processes.

    It is drawn where no dropout needs it too, so that later draws are upstream's; then the host does not ask for it.
    """
    drawn = torch.randint(0, 10_000, (), device=device)
    if not needed:
        return None
    if _processes.world_size() > 1:
        distributed.all_reduce(drawn)
    return int(drawn)


def last_quantizer(module: Any, device: torch.device, fixed_seed: int | None) -> int:
    """The index of the last quantiser of this step, the draw of upstream for the same seed."""
    chosen = random.Random(seed(device) if fixed_seed is None else fixed_seed)
    index = chosen.randrange(module.quantize_dropout_cutoff_index, module.num_quantizers)
    multiple: int = module.quantize_dropout_multiple_of
    return index if multiple == 1 else math.ceil((index + 1) / multiple) * multiple - 1


def padded(module: Any, indices: Tensor) -> Tensor:
    """Indices (..., Q) of all quantisers, −1 for those that ``indices`` lacks."""
    absent = module.num_quantizers - indices.shape[-1]
    if absent < 0 or (absent > 0 and not module.quantize_dropout):
        raise AssertionError(
            f"indices has {indices.shape[-1]} quantizers on its last axis; there are {module.num_quantizers}, and only "
            "quantize_dropout trains for fewer"
        )
    return F.pad(indices, (0, absent), value=-1) if absent else indices
