"""A training step of VectorQuantize in Triton, for gpu_step.py: two launches forward and one backward.

For a codebook that fits one tile; a larger one takes the launches of vector_quantize and two small ones of torch. Not
yet measured on a GPU.
"""

# mypy: allow-untyped-calls
# (Triton ships no types)
from __future__ import annotations

import torch
import triton
from torch import Tensor

from lamkernels import tuning
from lamkernels.ops.code_statistics.triton import Averages
from lamkernels.ops.triton_common import on_device, rows_in_place
from lamkernels.ops.vector_quantize.gpu_step import Step
from lamkernels.ops.vector_quantize.triton import Outputs, quantize_into
from lamkernels.ops.vector_quantize.triton_backward import vector_quantize_bwd_kernel

TYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CODES = 4096  # every program of the merge adds up the sizes of all codes


def fits(num_codes: int, dim: int, device: torch.device) -> bool:
    """Whether a codebook (K, D) is in reach."""
    return num_codes <= MAX_CODES


def step_forward(x: Tensor, precision: str, step: Step) -> None:
    """``x`` (1, N, D) or (1, B, N / B, D)."""
    codebook, sizes, code_sums = step.averages
    decay, eps = step.rates
    nothing = code_sums.unsqueeze(0)  # for what the averages take in instead
    out = Outputs(
        step.quantized, step.indices, step.loss, step.loss, nothing, nothing, nothing, step.num_rows, nothing
    )  # fmt: skip
    averages = Averages(torch.empty_like(sizes), sizes, code_sums, 1 - decay, eps, step.weight)
    quantize_into(out, x, codebook.unsqueeze(0), None, None, "l2", precision, averages)


def step_backward(
    x: Tensor, codes: Tensor, num_rows: Tensor, grad_quantized: Tensor | None, grad_loss: Tensor, grad_x: Tensor,
    weight: float,
) -> None:  # fmt: skip
    """Writes ``grad_x``, contiguous; of ``codes`` (1, N, D), NaN for a row that is not in."""
    (_, rows, dim), (x, strides) = codes.shape, rows_in_place(x)
    if codes.numel() == 0:
        return
    tile = tuning.elementwise(tuning.target_of(x.device), dim)
    tiles, chunks = triton.cdiv(rows, tile.rows), triton.cdiv(dim, tile.dim)
    with on_device(x):
        vector_quantize_bwd_kernel[(tiles * chunks,)](
            x, codes, num_rows, grad_loss, num_rows, codes if grad_quantized is None else grad_quantized, grad_loss,
            grad_loss, grad_x, grad_loss, rows, 0, dim, *strides,
            *((0, 0, 0) if grad_quantized is None else grad_quantized.stride()), 0, 0, tiles, chunks, tiles * chunks,
            1, weight, grad_quantized is not None, True, tile.rows, tile.dim, **tile.options(),
        )  # fmt: skip
