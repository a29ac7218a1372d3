"""Registration of ``lamkernels::nearest_code``: indices have no gradient, so there is no autograd formula."""

from __future__ import annotations

import torch
from torch import Tensor

from lamkernels.ops.registration import register


def _fake(x: Tensor, codebook: Tensor, metric: str, precision: str, return_distance: bool) -> tuple[Tensor, Tensor]:
    heads, rows = x.shape[0], x.shape[1:-1].numel()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    indices = x.new_empty((heads, rows), dtype=torch.int64)
    return indices, x.new_empty((heads, rows if return_distance else 0), dtype=dtype)


# x (H, N, D), or (H, B, N / B, D) whose rows lie in groups, codebook (H, K, D) ->
#   indices (H, N) int64, distance (H, N) or, where it was not asked for, (H, 0)
nearest_code = register(
    "nearest_code",
    "nearest_code",
    "(Tensor x, Tensor codebook, str metric, str precision, bool return_distance, str backend) -> (Tensor, Tensor)",
    _fake,
)
