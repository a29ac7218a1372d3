"""code_statistics in CUDA C++: the forward of vector_quantize with given indices and codes of zero."""

from __future__ import annotations

import torch
from torch import Tensor

from lamkernels.ops.vector_quantize.cuda import Outputs, launch_forward, unfit


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """``x`` (H, N, D) or (H, B, N / B, D), ``indices`` (H, N) int64."""
    heads, dim = x.shape[0], x.shape[-1]
    counts = x.new_empty((heads, num_codes), dtype=torch.int64)
    sums = x.new_empty((heads, num_codes, dim), dtype=torch.float32)
    if reason := unfit(x, sums, "l2"):
        raise ValueError(reason)
    if heads:
        launch_forward(x, None, num_codes, Outputs(counts=counts, sums=sums), given=indices)
    return counts, sums
