"""Training steps of VectorQuantize in Triton, for gpu_step.py: two launches forward and one backward.

For a codebook that fits one tile; a larger one takes the launches of vector_quantize and, for averages, two small ones
of torch. Not yet measured on a GPU.
"""

# mypy: allow-untyped-calls
# (Triton ships no types)
from __future__ import annotations

import torch
from torch import Tensor

from lamkernels import tuning
from lamkernels.ops.code_statistics.triton import Averages
from lamkernels.ops.triton_common import on_device, rows_in_place
from lamkernels.ops.vector_quantize.gpu_step import Learned, Step
from lamkernels.ops.vector_quantize.triton import Outputs, Writing, quantize_into
from lamkernels.ops.vector_quantize.triton_backward import vector_quantize_bwd_kernel

TYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CODES = 4096  # every program of the merge adds up the sizes of all codes


def fits(num_codes: int, dim: int, device: torch.device) -> bool:
    """Whether a codebook (K, D) with averages is in reach."""
    return num_codes <= MAX_CODES


def step_forward(x: Tensor, precision: str, step: Step) -> None:
    """``x`` (1, N, D) or (1, B, N / B, D)."""
    codebook, sizes, code_sums = step.averages
    decay, eps = step.rates
    averages = Averages(torch.empty_like(sizes), sizes, code_sums, 1 - decay, eps)
    nothing = code_sums.unsqueeze(0)  # for what the averages take in instead
    how = Writing("averages", averages, step.weight)
    quantize_into(_outputs(step, nothing), x, codebook.unsqueeze(0), None, None, "l2", precision, how)


def learned_forward(x: Tensor, codebook: Tensor, metric: str, precision: str, step: Learned) -> None:
    """``x`` as above, ``codebook`` (1, K, D)."""
    how = Writing("residuals", None, sum(step.weights))
    quantize_into(_outputs(step, step.residual_sums), x, codebook, None, None, metric, precision, how)


def _outputs(step: Step | Learned, sums: Tensor) -> Outputs:
    return Outputs(step.quantized, step.indices, step.loss, step.loss, sums, sums, sums, step.num_rows, sums)


def step_backward(
    x: Tensor, codes: Tensor, num_rows: Tensor, grad_quantized: Tensor | None, grad_loss: Tensor, grad_x: Tensor,
    weight: float,
) -> None:  # fmt: skip
    """Writes ``grad_x``, contiguous; of ``codes`` (1, N, D), NaN for a row that is not in."""
    learned_backward(x, codes, num_rows, grad_quantized, grad_loss, grad_x, (weight, 0.0), None, None)


def learned_backward(
    x: Tensor, codes: Tensor, num_rows: Tensor, grad_quantized: Tensor | None, grad_loss: Tensor, grad_x: Tensor,
    weights: tuple[float, float], residual_sums: Tensor | None, grad_codebook: Tensor | None,
) -> None:  # fmt: skip
    """And ``grad_codebook`` (K, D), of ``residual_sums`` (1, K, D), unless these are None."""
    (_, rows, dim), (x, strides) = codes.shape, rows_in_place(x)
    tile = tuning.elementwise(tuning.target_of(x.device), dim)
    tiles, chunks = tuning.ceil_div(rows, tile.rows), tuning.ceil_div(dim, tile.dim)
    entries = 0 if residual_sums is None else residual_sums.numel()
    code_tiles = tuning.ceil_div(entries, tile.rows * tile.dim)
    if tiles + code_tiles == 0:
        return
    with on_device(x):
        vector_quantize_bwd_kernel[(tiles * chunks + code_tiles,)](
            x, codes, num_rows, grad_loss if residual_sums is None else residual_sums, num_rows,
            codes if grad_quantized is None else grad_quantized, grad_loss, grad_loss, grad_x,
            grad_loss if grad_codebook is None else grad_codebook, rows, entries, dim, *strides,
            *((0, 0, 0) if grad_quantized is None else grad_quantized.stride()), 0, 0, tiles, chunks, tiles * chunks,
            max(code_tiles, 1), *weights, grad_quantized is not None, True, tile.rows, tile.dim, **tile.options(),
        )  # fmt: skip
