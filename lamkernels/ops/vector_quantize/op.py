"""Registration of ``lamkernels::vector_quantize`` and of its backward.

What the backward needs is what the forward leaves behind: the quantised rows (alive anyway, and right even after an
in-place EMA update of the codebook; with noise, the codes), the indices (−1 marks a row that is in no loss) and the
residual sums R_k = Σ (x − c_k), from which the codebook gradient is −2 R_k / (n·D) without another pass over the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamkernels.ops.registration import register, register_backward, register_gradient


def _fake_forward(
    x: Tensor, codebook: Tensor, mask: Tensor | None, noise: Tensor | None, metric: str, precision: str, gradient: str
) -> tuple[Tensor, ...]:
    heads, rows, (num_codes, dim) = x.shape[0], x.shape[1:-1].numel(), codebook.shape[1:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((heads, rows, dim)),
        x.new_empty((heads, rows), dtype=torch.int64),
        x.new_empty((heads,), dtype=dtype),
        x.new_empty((heads,), dtype=dtype),
        x.new_empty((heads, num_codes), dtype=torch.int64),
        x.new_empty((heads, num_codes, dim), dtype=dtype),
        x.new_empty((heads, num_codes, dim), dtype=dtype),
        x.new_empty((heads,), dtype=torch.int64),
        x.new_empty((heads, 0 if noise is None else rows, dim)),
    )


# x (H, N, D), or (H, B, N / B, D) whose rows lie in groups, codebook (H, K, D), mask (H, N) bool or None,
# noise (H, N, D) in x.dtype, for gradient="noise" alone ->
#   quantized (H, N, D) in x.dtype, indices (H, N) int64, commitment_loss (H,), codebook_loss (H,), counts (H, K) int64,
#   sums (H, K, D), residual_sums (H, K, D), num_rows (H,) int64: the rows that are in, and codes: (H, N, D) in x.dtype
#   with noise, where quantized is not the code, else (H, 0, D).
# Losses and sums are fp32, or fp64 for fp64 x. The two losses are equal; only their gradients differ.
# metric "cosine": the codebook is normalised already, x is not.
vector_quantize = register(
    "vector_quantize",
    "vector_quantize",
    "(Tensor x, Tensor codebook, Tensor? mask, Tensor? noise, str metric, str precision, str gradient, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)


# codes (H, N, D): the code of each row -> grad_x as x, grad_codebook (H, K, D) in that of residual_sums
vector_quantize_backward = register_backward(
    "vector_quantize_backward",
    "vector_quantize",
    "(Tensor x, Tensor codes, Tensor indices, Tensor residual_sums, Tensor num_rows, Tensor? noise, "
    "Tensor? grad_quantized, Tensor grad_commitment, Tensor grad_codebook_loss, str metric, str gradient, str backend) "
    "-> (Tensor, Tensor)",
    lambda x, codes, indices, residual_sums, *_: (x.new_empty(x.shape), torch.empty_like(residual_sums)),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, _, noise, metric, _, gradient, backend = inputs
    quantized, indices, _, _, counts, sums, residual_sums, num_rows, codes = output
    ctx.mark_non_differentiable(indices, counts, sums, residual_sums, num_rows, codes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, quantized if noise is None else codes, indices, residual_sums, num_rows, noise)
    ctx.codebook_dtype, ctx.options = codebook.dtype, (metric, gradient, backend)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, codes, indices, residual_sums, num_rows, noise = ctx.saved_tensors
    grad_quantized, grad_commitment, grad_codebook_loss = grads[0], grads[2], grads[3]
    needs_codebook = ctx.needs_input_grad[1]
    if grad_commitment is None:
        grad_commitment = residual_sums.new_zeros(num_rows.shape)
    if grad_codebook_loss is None:  # what nobody asks for may be any number; zeros take a launch
        grad_codebook_loss = torch.zeros_like(grad_commitment) if needs_codebook else grad_commitment
    grad_x, grad_codebook = vector_quantize_backward(
        x,
        codes,
        indices,
        residual_sums,
        num_rows,
        noise,
        grad_quantized,
        grad_commitment,
        grad_codebook_loss,
        *ctx.options,
    )
    return grad_x, grad_codebook.to(ctx.codebook_dtype) if needs_codebook else None, None, None, None, None, None, None


register_gradient("vector_quantize", _backward, _setup_context)
