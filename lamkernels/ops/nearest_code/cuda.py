"""nearest_code in CUDA C++: for few rows the forward of vector_quantize without what comes after the lookup."""

from __future__ import annotations

import torch
from torch import Tensor

from lamkernels.ops.nearest_code import cuda_hopper as hopper
from lamkernels.ops.vector_quantize import cuda as few

FEW_ROWS, FEW_CODES = 4096, 64  # up to here one launch is faster than what a large codebook needs


def unfit(x: Tensor, codebook: Tensor, metric: str, precision: str = "default") -> str:
    """Why no kernel can serve these, saying what they serve, or ""."""
    reason, beyond = few.unfit(x, codebook, metric), hopper.unfit(x, codebook, metric, precision)
    return f"{reason}; {beyond}" if reason and beyond else ""


def nearest_code(
    x: Tensor, codebook: Tensor, metric: str, precision: str, return_distance: bool
) -> tuple[Tensor, Tensor]:
    """``x`` (H, N, D) or (H, B, N / B, D), ``codebook`` (H, K, D); metric "l2" or "dot"."""
    heads, rows = x.shape[0], x.shape[1:-1].numel()
    if reason := unfit(x, codebook, metric, precision):
        raise ValueError(reason)
    many = (rows > FEW_ROWS and codebook.shape[1] > FEW_CODES) or few.unfit(x, codebook, metric)
    if heads * rows and many and not hopper.unfit(x, codebook, metric, precision):
        return hopper.nearest_code(x, codebook, metric, return_distance)
    indices = x.new_empty((heads, rows), dtype=torch.int64)
    distance = x.new_empty((heads, rows if return_distance else 0), dtype=torch.float32)
    if heads * rows:
        out = few.Outputs(indices=indices, distance=distance if return_distance else None)
        few.launch_forward(
            x, few.unit_inner(codebook), codebook.shape[1], out, metric=metric, precision=precision, statistics=False
        )
    return indices, distance
