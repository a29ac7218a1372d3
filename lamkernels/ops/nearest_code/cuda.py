"""nearest_code in CUDA C++: for few rows the forward of vector_quantize without what comes after the lookup."""

from __future__ import annotations

import torch
from torch import Tensor

from lamkernels.ops.nearest_code import cuda_hopper as hopper
from lamkernels.ops.vector_quantize.cuda import Outputs, launch_forward, unfit, unit_inner

FEW_ROWS = 4096  # up to here one launch is faster than what a large codebook needs


def nearest_code(
    x: Tensor, codebook: Tensor, metric: str, precision: str, return_distance: bool
) -> tuple[Tensor, Tensor]:
    """``x`` (H, N, D) or (H, B, N / B, D), ``codebook`` (H, K, D); metric "l2" or "dot"."""
    heads, rows = x.shape[0], x.shape[1:-1].numel()
    reason, beyond = unfit(x, codebook, metric), hopper.unfit(x, codebook, metric, precision)
    if reason and beyond:
        raise ValueError(f"{reason}; {beyond}")
    if heads * rows and not beyond and (reason or rows > FEW_ROWS):
        return hopper.nearest_code(x, codebook, metric, return_distance)
    indices = x.new_empty((heads, rows), dtype=torch.int64)
    distance = x.new_empty((heads, rows if return_distance else 0), dtype=torch.float32)
    if heads * rows:
        out = Outputs(indices=indices, distance=distance if return_distance else None)
        launch_forward(
            x, unit_inner(codebook), codebook.shape[1], out, metric=metric, precision=precision, statistics=False
        )
    return indices, distance
