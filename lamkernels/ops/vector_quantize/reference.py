"""The specification of vector_quantize and of its backward, accumulated in fp64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lamkernels.ops.code_statistics.reference import code_statistics
from lamkernels.ops.constants import COSINE_EPS, NOISE_EPS, ROTATION_EPS
from lamkernels.ops.nearest_code.reference import nearest_code


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, noise: Tensor | None, metric: str, precision: str, gradient: str
) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.vector_quantize`; ``x`` (H, ..., D), ``codebook`` (H, K, D), ``mask`` (H, N),
    ``noise`` (H, N, D).

    A row is *in* when it is finite and not masked. A row that is not finite is quantised to NaN, a masked one to zero.
    """
    x, accumulator = x.flatten(1, -2), torch.float64 if x.dtype == torch.float64 else torch.float32
    indices, _ = nearest_code(x, codebook, metric, precision, False)
    if mask is not None:
        indices = indices.where(mask, -1)
    inside = indices >= 0  # (H, N)
    gather = indices.clamp(min=0)[..., None].expand(x.shape)
    code = codebook.gather(1, gather).masked_fill(~inside[..., None], torch.nan)
    row = F.normalize(x.double(), dim=-1, eps=COSINE_EPS) if metric == "cosine" else x.double()
    residual = (row - code.double()).masked_fill(~inside[..., None], 0.0)  # (H, N, D)
    quantized = code.to(x.dtype)
    codes = quantized[:, :0].clone()
    if noise is not None:  # NSVQ (Vali and Bäckström 2022): the residual's length in a random direction
        length = noise.double().norm(dim=-1, keepdim=True)
        scale = (residual.norm(dim=-1, keepdim=True) / length + NOISE_EPS).masked_fill(length == 0, 0.0)
        quantized, codes = (row + scale * noise.double()).to(x.dtype).where(inside[..., None], quantized), quantized
    if mask is not None:
        quantized = quantized.masked_fill(~mask[..., None], 0.0)
        codes = codes.masked_fill(~mask[..., None], 0.0) if noise is not None else codes
    num_rows = inside.sum(-1)
    loss = (residual.square().sum((1, 2)) / (num_rows * x.shape[-1]).clamp(min=1)).to(accumulator)
    counts, residual_sums = code_statistics(residual, indices, codebook.shape[1])
    finite_codes = codebook.double().masked_fill(counts[..., None] == 0, 0.0)  # 0 · NaN would not be 0
    sums = (counts[..., None] * finite_codes + residual_sums).to(accumulator)
    return quantized, indices, loss, loss.clone(), counts, sums, residual_sums.to(accumulator), num_rows, codes


def vector_quantize_backward(
    x: Tensor, codes: Tensor, indices: Tensor, residual_sums: Tensor, num_rows: Tensor, noise: Tensor | None,
    grad_quantized: Tensor | None, grad_commitment: Tensor, grad_codebook_loss: Tensor, metric: str, gradient: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx = J·g + g_commitment · 2 (x − q) / (n·D), 0 for rows that are not in; dc_k = −g_codebook · 2 R_k / (n·D).

    J is 1 for "ste", the transposed rotation and scaling of x onto q for "rotation" (Fifty et al. 2024), and for
    "noise" 1 + (x − q) vᵀ / (‖x − q‖·‖v‖), whose second part also goes to the codes, negated.
    """
    shape, x = x.shape, x.flatten(1, -2)
    scale = 2.0 / (num_rows * x.shape[-1]).clamp(min=1).double()  # (H,)
    norm = x.double().norm(dim=-1, keepdim=True).clamp(min=COSINE_EPS)
    row, q = x.double() / norm if metric == "cosine" else x.double(), codes.double()
    grad_row = (grad_commitment * scale)[:, None, None] * (row - q)
    grad_codebook = -(grad_codebook_loss * scale)[:, None, None] * residual_sums
    if grad_quantized is not None:
        g = grad_quantized.double()
        if gradient == "rotation":
            length, target = (t.norm(dim=-1, keepdim=True).clamp(min=ROTATION_EPS) for t in (row, q))
            u, towards = row / length, q / target
            w = F.normalize(u + towards, dim=-1, eps=ROTATION_EPS)
            rotated = g - 2 * (g * w).sum(-1, keepdim=True) * w + 2 * (g * towards).sum(-1, keepdim=True) * u
            g = q.norm(dim=-1, keepdim=True) / length * rotated
        if noise is not None:
            v, distance = noise.double(), (row - q).norm(dim=-1, keepdim=True)
            along = (g * v).sum(-1, keepdim=True) / (v.norm(dim=-1, keepdim=True) * distance)
            pull = (along * (row - q)).nan_to_num(0.0, 0.0, 0.0)  # no direction where a length is zero
            grad_codebook = grad_codebook - code_statistics(pull, indices, residual_sums.shape[1])[1]
            g = g + pull
        grad_row = grad_row + g
    if metric == "cosine":
        along = (grad_row * row).sum(-1, keepdim=True) * (norm > COSINE_EPS)
        grad_row = (grad_row - along * row) / norm
    grad_row = grad_row.masked_fill((indices < 0)[..., None], 0.0).to(x.dtype)
    return grad_row.view(shape), grad_codebook.to(residual_sums.dtype)
