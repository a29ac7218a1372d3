"""The backward of vector_quantize in Triton: one launch, of programs for the rows and programs for the codebook."""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.code_statistics.triton import code_statistics
from lamkernels.ops.constants import ROTATION_EPS
from lamkernels.ops.triton_common import COSINE_CLAMP, first_entries, on_device, rows_in_place, unit_scales

ROTATION_CLAMP = tl.constexpr(ROTATION_EPS)


@triton.jit
def vector_quantize_bwd_kernel(
    x: tensor, quantized: tensor, indices: tensor, residual_sums: tensor, rows_in: tensor, grad_quantized: tensor,
    grad_commitment: tensor, grad_codebook_loss: tensor, grad_x: tensor, grad_codebook: tensor, num_rows: tensor,
    code_entries: tensor, dim: tensor, x_h: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor, g_h: tensor,
    g_n: tensor, g_d: tensor, commitment_h: tensor, codebook_h: tensor, tiles: tensor, chunks: tensor,
    row_programs: tensor, code_tiles: tensor, commitment_weight: tensor, codebook_weight: tensor,
    GRAD: tl.constexpr, BY_CODE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """The first ``row_programs`` programs write grad_x, the others grad_codebook.

    With BY_CODE a row is in unless its code is NaN. The weights multiply the gradients of the losses.
    """
    wide = residual_sums.dtype.element_ty
    program = tl.program_id(0)
    if program < row_programs:
        head = (program // (tiles * chunks)).to(tl.int64)
        row = ((program // chunks) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
        d = (program % chunks) * BD + tl.arange(0, BD)
        inside = (row < num_rows)[:, None] & (d < dim)[None, :]  # [BN, BD]
        place = (head * num_rows + row)[:, None] * dim + d[None, :]
        if BY_CODE:
            code = tl.load(quantized + place, mask=inside, other=0.0).to(wide)
            used = inside & (code == code)
        else:
            index = tl.load(indices + head * num_rows + row, mask=row < num_rows, other=-1)
            used = inside & (index >= 0)[:, None]
            code = tl.load(quantized + place, mask=used, other=0.0).to(wide)
        count = tl.maximum(tl.load(rows_in + head) * dim, 1).to(tl.float64)
        scale = (tl.load(grad_commitment + head * commitment_h) * commitment_weight).to(tl.float64) * (2.0 / count)
        rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
        entry = tl.load(rows[:, None] + d[None, :] * x_d, mask=used, other=0.0).to(wide)
        grad = (entry - code) * scale.to(wide)
        if GRAD:
            source = grad_quantized + head * g_h + row[:, None] * g_n + d.to(tl.int64)[None, :] * g_d
            grad += tl.load(source, mask=used, other=0.0).to(wide)
        tl.store(grad_x + place, tl.where(used, grad, 0.0).to(grad_x.dtype.element_ty), mask=inside)
    else:
        scale_residual_sums(
            program - row_programs, residual_sums, rows_in, grad_codebook_loss, grad_codebook, code_entries, dim,
            codebook_h, code_tiles, codebook_weight, BN * BD,
        )  # fmt: skip


@triton.jit
def scale_residual_sums(
    program: tensor, residual_sums: tensor, rows_in: tensor, grad_codebook_loss: tensor, grad_codebook: tensor,
    code_entries: tensor, dim: tensor, codebook_h: tensor, code_tiles: tensor, weight: tensor,
    B: tl.constexpr,
) -> None:  # fmt: skip
    """The codebook gradient −2 R / (n·D) · weight, ``B`` entries a program."""
    head = (program // code_tiles).to(tl.int64)
    flat = (program % code_tiles).to(tl.int64) * B + tl.arange(0, B)
    target = head * code_entries + flat
    rows = tl.maximum(tl.load(rows_in + head) * dim, 1).to(tl.float64)
    scale = (tl.load(grad_codebook_loss + head * codebook_h) * weight).to(tl.float64) * (-2.0 / rows)
    total = tl.load(residual_sums + target, mask=flat < code_entries, other=0.0)
    tl.store(grad_codebook + target, total * scale.to(total.dtype), mask=flat < code_entries)


@triton.jit
def by_row_bwd_kernel(
    x: tensor, codes: tensor, indices: tensor, residual_sums: tensor, rows_in: tensor, grad_quantized: tensor,
    grad_commitment: tensor, grad_codebook_loss: tensor, grad_x: tensor, grad_codebook: tensor, num_rows: tensor,
    code_entries: tensor, dim: tensor, x_h: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor, g_h: tensor,
    g_n: tensor, g_d: tensor, commitment_h: tensor, codebook_h: tensor, tiles: tensor, chunks: tensor,
    row_programs: tensor, code_tiles: tensor, noise: tensor, pull: tensor,
    ROTATION: tl.constexpr, NOISE: tl.constexpr, COSINE: tl.constexpr, GRAD: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
) -> None:  # fmt: skip
    """As the kernel above where the gradient of an entry needs sums over its row; see the reference for the formulas.

    With b = u + q̂ the rotation sends s(g − 2 (g·b)/‖b‖² b + 2 (g·q̂) u), so three factors a row do.
    """
    wide = residual_sums.dtype.element_ty
    program = tl.program_id(0)
    if program < row_programs:
        head = (program // tiles).to(tl.int64)
        row = (program % tiles).to(tl.int64) * BN + tl.arange(0, BN)
        index = tl.load(indices + head * num_rows + row, mask=row < num_rows, other=-1)
        rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
        place = (head * num_rows + row) * dim
        source = grad_quantized + head * g_h + row * g_n
        count = tl.maximum(tl.load(rows_in + head) * dim, 1).to(tl.float64)
        weight = (tl.load(grad_commitment + head * commitment_h).to(tl.float64) * (2.0 / count)).to(wide)
        first = tl.full([BN], 1.0, wide)
        second = first
        if COSINE:
            first, second = unit_scales(rows, x_d, index >= 0, dim, wide, BN, BD)
        zero = tl.zeros([BN], tl.float64)
        x_x, q_q, r_r, v_v, g_v, b_b, g_b, g_q, along = zero, zero, zero, zero, zero, zero, zero, zero, zero
        if ROTATION or NOISE:
            for start in range(0, dim, BD):
                d = start + tl.arange(0, BD)
                inside = (index >= 0)[:, None] & (d < dim)[None, :]  # [BN, BD]
                entry = tl.load(rows[:, None] + d[None, :] * x_d, mask=inside, other=0.0).to(wide)
                entry = (entry * first[:, None] * second[:, None]).to(tl.float64)
                code = tl.load(codes + place[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float64)
                x_x += tl.sum(entry * entry, axis=1)
                q_q += tl.sum(code * code, axis=1)
                r_r += tl.sum((entry - code) * (entry - code), axis=1)
                if NOISE:
                    grad = tl.load(source[:, None] + d.to(tl.int64)[None, :] * g_d, mask=inside, other=0.0)
                    direction = tl.load(noise + place[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float64)
                    v_v += tl.sum(direction * direction, axis=1)
                    g_v += tl.sum(grad.to(tl.float64) * direction, axis=1)
        # h = by_g·g + by_x·x + by_q·q, with the commitment loss in it
        by_g = tl.full([BN], 1.0, tl.float64)
        by_x = tl.zeros([BN], tl.float64) + weight.to(tl.float64)
        by_q = -by_x
        factor = zero
        if NOISE:
            size = tl.sqrt(r_r) * tl.sqrt(v_v)
            factor = tl.where(size > 0, g_v / tl.where(size > 0, size, 1.0), 0.0)
            by_x += factor
            by_q -= factor
        if ROTATION:
            to_unit = 1.0 / tl.maximum(tl.sqrt(x_x), ROTATION_CLAMP)
            to_target = 1.0 / tl.maximum(tl.sqrt(q_q), ROTATION_CLAMP)
            for start in range(0, dim, BD):
                d = start + tl.arange(0, BD)
                inside = (index >= 0)[:, None] & (d < dim)[None, :]
                entry = tl.load(rows[:, None] + d[None, :] * x_d, mask=inside, other=0.0).to(wide)
                unit = (entry * first[:, None] * second[:, None]).to(tl.float64) * to_unit[:, None]
                target = tl.load(codes + place[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float64)
                target = target * to_target[:, None]
                grad = tl.load(source[:, None] + d.to(tl.int64)[None, :] * g_d, mask=inside, other=0.0).to(tl.float64)
                b_b += tl.sum((unit + target) * (unit + target), axis=1)
                g_b += tl.sum(grad * (unit + target), axis=1)
                g_q += tl.sum(grad * target, axis=1)
            clamped = tl.maximum(tl.sqrt(b_b), ROTATION_CLAMP)
            by_b = -2.0 * g_b / (clamped * clamped)
            by_g = tl.sqrt(q_q) * to_unit
            by_x += by_g * (by_b + 2.0 * g_q) * to_unit
            by_q += by_g * by_b * to_target
        if COSINE:
            for start in range(0, dim, BD):
                d = start + tl.arange(0, BD)
                inside = (index >= 0)[:, None] & (d < dim)[None, :]
                entry = tl.load(rows[:, None] + d[None, :] * x_d, mask=inside, other=0.0).to(wide)
                entry = (entry * first[:, None] * second[:, None]).to(tl.float64)
                code = tl.load(codes + place[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float64)
                h = by_x[:, None] * entry + by_q[:, None] * code
                if GRAD:
                    grad = tl.load(source[:, None] + d.to(tl.int64)[None, :] * g_d, mask=inside, other=0.0)
                    h += by_g[:, None] * grad.to(tl.float64)
                along += tl.sum(h * entry, axis=1)
            along = tl.where(first * second < 1.0 / COSINE_CLAMP, along, 0.0)  # a clamped norm is a constant
        for start in range(0, dim, BD):
            d = start + tl.arange(0, BD)
            present = (row < num_rows)[:, None] & (d < dim)[None, :]
            inside = present & (index >= 0)[:, None]
            entry = tl.load(rows[:, None] + d[None, :] * x_d, mask=inside, other=0.0).to(wide)
            entry = (entry * first[:, None] * second[:, None]).to(tl.float64)
            code = tl.load(codes + place[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float64)
            h = (by_x - along)[:, None] * entry + by_q[:, None] * code
            if GRAD:
                grad = tl.load(source[:, None] + d.to(tl.int64)[None, :] * g_d, mask=inside, other=0.0)
                h += by_g[:, None] * grad.to(tl.float64)
            h = h * (first.to(tl.float64) * second.to(tl.float64))[:, None]
            at = place[:, None] + d[None, :]
            tl.store(grad_x + at, tl.where(inside, h, 0.0).to(wide).to(grad_x.dtype.element_ty), mask=present)
            if NOISE:
                tl.store(pull + at, tl.where(inside, factor[:, None] * (entry - code), 0.0).to(wide), mask=present)
    else:
        scale_residual_sums(
            program - row_programs, residual_sums, rows_in, grad_codebook_loss, grad_codebook, code_entries, dim,
            codebook_h, code_tiles, 1.0, BN * BD,
        )  # fmt: skip


def vector_quantize_backward(
    x: Tensor, codes: Tensor, indices: Tensor, residual_sums: Tensor, num_rows: Tensor, noise: Tensor | None,
    grad_quantized: Tensor | None, grad_commitment: Tensor, grad_codebook_loss: Tensor, metric: str, gradient: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad_x as x, contiguous, and grad_codebook (H, K, D) in that of ``residual_sums``, in one launch.

    Noise takes the launches of code_statistics on top, for what it sends to the codes.
    """
    (heads, rows, dim), num_codes, (x, strides) = codes.shape, residual_sums.shape[1], rows_in_place(x)
    grad_x, grad_codebook = x.new_empty(x.shape), residual_sums.new_empty(residual_sums.shape)
    rotation = gradient == "rotation" and grad_quantized is not None
    noise = None if noise is None or grad_quantized is None else noise.contiguous()
    pull = None if noise is None else residual_sums.new_empty(codes.shape)
    by_row = rotation or noise is not None or metric == "cosine"
    tile = (tuning.by_row if by_row else tuning.elementwise)(tuning.target_of(x.device), dim)
    tiles, chunks = tuning.ceil_div(rows, tile.rows), 1 if by_row else tuning.ceil_div(dim, tile.dim)
    code_tiles = tuning.ceil_div(num_codes * dim, tile.rows * tile.dim)
    row_programs = heads * tiles * chunks
    arguments = (
        x, codes.contiguous(), indices.contiguous(), residual_sums.contiguous(), num_rows.contiguous(),
        x if grad_quantized is None else grad_quantized, grad_commitment, grad_codebook_loss, grad_x, grad_codebook,
        rows, num_codes * dim, dim, *strides,
        *((0, 0, 0) if grad_quantized is None else grad_quantized.stride()),
        grad_commitment.stride(0), grad_codebook_loss.stride(0), tiles, chunks, row_programs, code_tiles,
    )  # fmt: skip
    shape = (grad_quantized is not None, tile.rows, tile.dim)
    grid = (row_programs + heads * code_tiles,)
    with on_device(x):
        if by_row:
            by_row_bwd_kernel[grid](
                *arguments, x if noise is None else noise, x if pull is None else pull, rotation, noise is not None,
                metric == "cosine", *shape, **tile.options(),
            )  # fmt: skip
        else:
            vector_quantize_bwd_kernel[grid](*arguments, 1.0, 1.0, shape[0], False, *shape[1:], **tile.options())
        if pull is not None:
            grad_codebook -= code_statistics(pull, indices, num_codes)[1]
    return grad_x, grad_codebook
