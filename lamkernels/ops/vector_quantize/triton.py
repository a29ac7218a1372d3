"""vector_quantize and its backward in Triton.

While the codebook fits one tile, one pass over the rows gives index, output, loss and residual sums, and one small
kernel merges the parts of the persistent programs. Otherwise, and for fp64 arithmetic: lookup, then output and loss,
then the sums over rows sorted by code. Nothing waits for the host and no shape depends on the data, so that either
path can be captured in a CUDA graph; the partition is fixed, so that its bits are too.
"""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.code_statistics.triton import merge_sums, segment_sums
from lamkernels.ops.nearest_code.triton import nearest_code
from lamkernels.ops.triton_common import (
    Arithmetic,
    arithmetic,
    fp32_product,
    grouped_sum,
    nearest_resident,
    on_device,
    persistent_programs,
    resident_norms,
    scan_exactly,
    unit_inner,
)


@triton.jit
def vector_quantize_fwd_kernel(
    x: tensor, codebook: tensor, mask: tensor, quantized: tensor, indices: tensor, parts: tensor, part_counts: tensor,
    part_losses: tensor, num_rows: tensor, num_codes: tensor, dim: tensor, x_h: tensor, x_n: tensor, c_h: tensor,
    c_k: tensor, m_h: tensor, m_n: tensor, tiles: tensor, programs: tensor,
    L2: tl.constexpr, CENTRE: tl.constexpr, NATIVE: tl.constexpr, DOT: tl.constexpr, SUM_DOT: tl.constexpr,
    MASK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """Lookup, output, and per program: residual sums (H, P, K, D), counts (H, P, K), loss and rows (H, P, 2)."""
    head = (tl.program_id(0) // programs).to(tl.int64)
    codebook += head * c_h
    centre, half_norm, limit = resident_norms(codebook, c_k, num_codes, dim, L2, CENTRE, BK, BD)
    k = tl.arange(0, BK)
    d = tl.arange(0, BD)
    total = tl.zeros([BK, BD], tl.float32)
    count = tl.zeros([BK], tl.int32)
    loss = tl.zeros([BN], tl.float64)
    for tile in range(tl.program_id(0) % programs, tiles, programs):
        row = tl.cast(tile, tl.int64) * BN + tl.arange(0, BN)
        present = row < num_rows
        kept = present
        if MASK:
            kept = present & (tl.load(mask + head * m_h + row * m_n, mask=present, other=0) != 0)
        rows = x + head * x_h + row * x_n
        entry = tl.load(rows[:, None] + d[None, :], mask=present[:, None] & (d < dim)[None, :], other=0.0)  # [BN, BD]
        index, again = nearest_resident(
            entry, codebook, c_k, num_codes, dim, centre, half_norm, limit, CENTRE, NATIVE, DOT, BK, BD
        )
        again = again & kept
        if tl.max(again.to(tl.int32), axis=0) > 0:
            scanned, _ = scan_exactly(rows, again, codebook, c_k, num_codes, dim, L2, BN, 16)
            index = tl.where(again, scanned, index)
        index = tl.where(kept, index, -1)
        tl.store(indices + head * num_rows + row, index.to(tl.int64), mask=present)
        inside = (index >= 0)[:, None] & (d < dim)[None, :]
        chosen = tl.load(codebook + index.to(tl.int64)[:, None] * c_k + d[None, :], mask=inside, other=0.0)
        value = tl.where((index >= 0)[:, None], chosen.to(tl.float32), float("nan"))
        value = tl.where(kept[:, None], value, 0.0).to(quantized.dtype.element_ty)
        out = quantized + (head * num_rows + row)[:, None] * dim + d[None, :]
        tl.store(out, value, mask=present[:, None] & (d < dim)[None, :])
        residual = tl.where(inside, entry.to(tl.float32) - chosen.to(tl.float32), 0.0)
        loss += tl.sum(residual * residual, axis=1).to(tl.float64)
        member = index[None, :] == k[:, None]  # [BK, BN]
        total += grouped_sum(member, residual, SUM_DOT)
        count += tl.sum(member.to(tl.int32), axis=1)
    program = tl.program_id(0).to(tl.int64)
    part = program * num_codes + k
    tl.store(parts + part[:, None] * dim + d[None, :], total, mask=(k < num_codes)[:, None] & (d < dim)[None, :])
    tl.store(part_counts + part, count, mask=k < num_codes)
    tl.store(part_losses + program * 2, tl.sum(loss, axis=0))
    tl.store(part_losses + program * 2 + 1, tl.sum(count, axis=0).to(tl.float64))


@triton.jit
def quantize_rows_kernel(
    x: tensor, codebook: tensor, mask: tensor, quantized: tensor, indices: tensor, part_losses: tensor,
    num_rows: tensor, dim: tensor, x_h: tensor, x_n: tensor, c_h: tensor, c_k: tensor, m_h: tensor, m_n: tensor,
    tiles: tensor,
    MASK: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """Output and loss of rows whose nearest code is known; writes −1 over the index of a masked row."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
    present = row < num_rows
    index = tl.load(indices + head * num_rows + row, mask=present, other=-1)
    kept = present
    if MASK:
        kept = present & (tl.load(mask + head * m_h + row * m_n, mask=present, other=0) != 0)
        index = tl.where(kept, index, -1)
        tl.store(indices + head * num_rows + row, index, mask=present)
    loss = tl.zeros([BN], tl.float64)
    for start in range(0, dim, BD):
        d = start + tl.arange(0, BD)
        inside = (index >= 0)[:, None] & (d < dim)[None, :]  # [BN, BD]
        entry = tl.load(x + head * x_h + row[:, None] * x_n + d[None, :], mask=inside, other=0.0).to(WIDE)
        chosen = tl.load(codebook + head * c_h + index[:, None] * c_k + d[None, :], mask=inside, other=0.0).to(WIDE)
        value = tl.where((index >= 0)[:, None], chosen, float("nan"))
        value = tl.where(kept[:, None], value, 0.0).to(quantized.dtype.element_ty)
        out = quantized + (head * num_rows + row)[:, None] * dim + d[None, :]
        tl.store(out, value, mask=present[:, None] & (d < dim)[None, :])
        loss += tl.sum((entry - chosen) * (entry - chosen), axis=1).to(tl.float64)
    part = tl.program_id(0).to(tl.int64) * 2
    tl.store(part_losses + part, tl.sum(loss, axis=0))
    tl.store(part_losses + part + 1, tl.sum((index >= 0).to(tl.float64), axis=0))


@triton.jit
def vector_quantize_bwd_kernel(
    x: tensor, quantized: tensor, indices: tensor, residual_sums: tensor, rows_in: tensor, grad_quantized: tensor,
    grad_commitment: tensor, grad_codebook_loss: tensor, grad_x: tensor, grad_codebook: tensor, num_rows: tensor,
    code_entries: tensor, dim: tensor, x_h: tensor, x_n: tensor, g_h: tensor, g_n: tensor, g_d: tensor,
    commitment_h: tensor, codebook_h: tensor, tiles: tensor, chunks: tensor, row_programs: tensor, code_tiles: tensor,
    GRAD: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """The first ``row_programs`` programs write grad_x, the others grad_codebook."""
    wide = residual_sums.dtype.element_ty
    program = tl.program_id(0)
    if program < row_programs:
        head = (program // (tiles * chunks)).to(tl.int64)
        row = ((program // chunks) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
        d = (program % chunks) * BD + tl.arange(0, BD)
        inside = (row < num_rows)[:, None] & (d < dim)[None, :]  # [BN, BD]
        place = (head * num_rows + row)[:, None] * dim + d[None, :]
        index = tl.load(indices + head * num_rows + row, mask=row < num_rows, other=-1)
        used = inside & (index >= 0)[:, None]
        rows = tl.maximum(tl.load(rows_in + head) * dim, 1).to(tl.float64)
        scale = tl.load(grad_commitment + head * commitment_h).to(tl.float64) * (2.0 / rows)
        entry = tl.load(x + head * x_h + row[:, None] * x_n + d[None, :], mask=used, other=0.0).to(wide)
        residual = entry - tl.load(quantized + place, mask=used, other=0.0).to(wide)
        grad = residual * scale.to(wide)
        if GRAD:
            source = grad_quantized + head * g_h + row[:, None] * g_n + d.to(tl.int64)[None, :] * g_d
            grad += tl.load(source, mask=used, other=0.0).to(wide)
        tl.store(grad_x + place, tl.where(used, grad, 0.0).to(grad_x.dtype.element_ty), mask=inside)
    else:
        head = ((program - row_programs) // code_tiles).to(tl.int64)
        flat = ((program - row_programs) % code_tiles).to(tl.int64) * (BN * BD) + tl.arange(0, BN * BD)
        target = head * code_entries + flat
        rows = tl.maximum(tl.load(rows_in + head) * dim, 1).to(tl.float64)
        scale = tl.load(grad_codebook_loss + head * codebook_h).to(tl.float64) * (-2.0 / rows)
        total = tl.load(residual_sums + target, mask=flat < code_entries, other=0.0)
        tl.store(grad_codebook + target, total * scale.to(wide), mask=flat < code_entries)


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str
) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.vector_quantize`. ``x`` (H, N, D), ``codebook`` (H, K, D), ``mask`` (H, N) bool or None."""
    x, codebook, target = unit_inner(x), unit_inner(codebook), tuning.target_of(x.device)
    (heads, rows, dim), num_codes = x.shape, codebook.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    quantized = x.new_empty((heads, rows, dim))
    commitment_loss, codebook_loss = x.new_empty((heads,), dtype=wide), x.new_empty((heads,), dtype=wide)
    counts = x.new_empty((heads, num_codes), dtype=torch.int64)
    sums, residual_sums = (x.new_empty((heads, num_codes, dim), dtype=wide) for _ in range(2))
    rows_in = x.new_empty((heads,), dtype=torch.int64)
    losses = (commitment_loss, codebook_loss, rows_in)
    how = arithmetic(x, codebook, metric, precision, target)
    tile = None if how.exact else tuning.resident(target, rows, num_codes, dim)
    with on_device(x):
        if tile is not None:
            indices = _fused(
                x, codebook, mask, quantized, metric == "l2", how, tile, counts, sums, residual_sums, losses
            )
        else:
            indices, _ = nearest_code(x, codebook, metric, precision, False)
            part_losses = _quantize_rows(x, codebook, mask, quantized, indices)
            parts, offsets, tiles, segment = segment_sums(x, codebook, indices, num_codes)
            merge_sums(parts, offsets, part_losses, codebook, counts, sums, residual_sums, losses, tiles, segment)
    return quantized, indices, commitment_loss, codebook_loss, counts, sums, residual_sums, rows_in


def _fused(
    x: Tensor, codebook: Tensor, mask: Tensor | None, quantized: Tensor, l2: bool, how: Arithmetic, tile: tuning.Tile,
    counts: Tensor, sums: Tensor, residual_sums: Tensor, losses: tuple[Tensor, ...],
) -> Tensor:  # fmt: skip
    (heads, rows, dim), num_codes = x.shape, codebook.shape[1]
    indices = x.new_empty((heads, rows), dtype=torch.int64)
    tiles = triton.cdiv(rows, tile.rows)
    programs = max(1, min(tiles, persistent_programs(x.device)))
    parts = x.new_empty((heads, programs, num_codes, dim), dtype=torch.float32)
    part_counts = x.new_empty((heads, programs, num_codes), dtype=torch.int32)
    part_losses = x.new_empty((heads, programs, 2), dtype=torch.float64)
    vector_quantize_fwd_kernel[(heads * programs,)](
        x, codebook, indices if mask is None else mask, quantized, indices, parts, part_counts, part_losses,
        rows, num_codes, dim, *x.stride()[:2], *codebook.stride()[:2], *((0, 0) if mask is None else mask.stride()),
        tiles, programs, l2, how.centre, how.native, how.dot, fp32_product(tuning.target_of(x.device)),
        mask is not None, tile.rows, tile.codes, tile.dim, **tile.options(),
    )  # fmt: skip
    merge_sums(parts, part_counts, part_losses, codebook, counts, sums, residual_sums, losses, programs, 0)
    return indices


def _quantize_rows(x: Tensor, codebook: Tensor, mask: Tensor | None, quantized: Tensor, indices: Tensor) -> Tensor:
    (heads, rows, dim), tile = x.shape, tuning.elementwise(tuning.target_of(x.device), x.shape[-1])
    tiles = triton.cdiv(rows, tile.rows)
    part_losses = x.new_empty((heads, tiles, 2), dtype=torch.float64)
    if heads * tiles:
        quantize_rows_kernel[(heads * tiles,)](
            x, codebook, indices if mask is None else mask, quantized, indices, part_losses, rows, dim,
            *x.stride()[:2], *codebook.stride()[:2], *((0, 0) if mask is None else mask.stride()), tiles,
            mask is not None, tl.float64 if x.dtype == torch.float64 else tl.float32, tile.rows, tile.dim,
            **tile.options(),
        )  # fmt: skip
    return part_losses


def vector_quantize_backward(
    x: Tensor, quantized: Tensor, indices: Tensor, residual_sums: Tensor, num_rows: Tensor,
    grad_quantized: Tensor | None, grad_commitment: Tensor, grad_codebook_loss: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad_x (H, N, D) in the dtype of x and grad_codebook (H, K, D) in that of ``residual_sums``, in one launch."""
    x, (heads, rows, dim), num_codes = unit_inner(x), x.shape, residual_sums.shape[1]
    grad_x, grad_codebook = x.new_empty(x.shape), residual_sums.new_empty(residual_sums.shape)
    tile = tuning.elementwise(tuning.target_of(x.device), dim)
    tiles, chunks = triton.cdiv(rows, tile.rows), triton.cdiv(dim, tile.dim)
    code_tiles = triton.cdiv(num_codes * dim, tile.rows * tile.dim)
    row_programs = heads * tiles * chunks
    with on_device(x):
        vector_quantize_bwd_kernel[(row_programs + heads * code_tiles,)](
            x, quantized.contiguous(), indices.contiguous(), residual_sums.contiguous(), num_rows.contiguous(),
            x if grad_quantized is None else grad_quantized, grad_commitment, grad_codebook_loss, grad_x, grad_codebook,
            rows, num_codes * dim, dim, *x.stride()[:2],
            *((0, 0, 0) if grad_quantized is None else grad_quantized.stride()),
            grad_commitment.stride(0), grad_codebook_loss.stride(0), tiles, chunks, row_programs, code_tiles,
            grad_quantized is not None, tile.rows, tile.dim, **tile.options(),
        )  # fmt: skip
    return grad_x, grad_codebook
