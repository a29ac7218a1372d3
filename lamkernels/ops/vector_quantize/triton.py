"""vector_quantize in Triton; its backward is in triton_backward.py.

While the codebook fits one tile, one pass over the rows gives index, output, loss and residual sums, and one small
kernel merges the parts of the persistent programs. Otherwise, and for fp64 arithmetic: lookup, then output and loss,
then the sums over rows sorted by code. Nothing waits for the host and no shape depends on the data, so that either
path can be captured in a CUDA graph; the partition is fixed, so that its bits are too.
"""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.code_statistics.triton import Averages, merge_sums, segment_sums
from lamkernels.ops.constants import NOISE_EPS
from lamkernels.ops.nearest_code.triton import nearest_code
from lamkernels.ops.triton_common import (
    Arithmetic,
    arithmetic,
    doubt,
    first_entries,
    fp32_product,
    grouped_sum,
    is_doubtful,
    nearest_resident,
    on_device,
    persistent_programs,
    resident_norms,
    rows_in_place,
    rows_to_scan,
    scan_exactly,
    squared_norm,
    unit_inner,
    unit_scales,
)
from lamkernels.ops.triton_cosine import normalised
from lamkernels.ops.vector_quantize.triton_backward import vector_quantize_backward

__all__ = ["vector_quantize", "vector_quantize_backward"]

NOISE_FLOOR = tl.constexpr(NOISE_EPS)


@triton.jit
def vector_quantize_fwd_kernel(
    x: tensor, codebook: tensor, mask: tensor, quantized: tensor, indices: tensor, parts: tensor, part_counts: tensor,
    part_losses: tensor, noise: tensor, codes: tensor, sizes_before: tensor, cluster_size: tensor, num_rows: tensor,
    num_codes: tensor, dim: tl.constexpr, x_h: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor, c_h: tensor,
    c_k: tensor, m_h: tensor, m_n: tensor, tiles: tensor, programs: tensor, lowest: tensor,
    L2: tl.constexpr, COSINE: tl.constexpr, NOISE: tl.constexpr, CENTRE: tl.constexpr, NATIVE: tl.constexpr,
    DOT: tl.constexpr, SUM_DOT: tl.constexpr, MASK: tl.constexpr, AVERAGES: tl.constexpr, AHEAD: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """Lookup, output, and per program: residual sums (H, P, K, D), counts (H, P, K), loss and rows (H, P, 2).

    With AVERAGES, for the merge that updates them, also a copy of their sizes. A row that is not finite or not in gets
    the index ``lowest``, −1 or 0.
    """
    head = (tl.program_id(0) // programs).to(tl.int64)
    codebook += head * c_h
    centre, half_norm, limit = resident_norms(codebook, c_k, num_codes, dim, L2, CENTRE, BK, BD)
    k = tl.arange(0, BK)
    d = tl.arange(0, BD)
    total = tl.zeros([BK, BD], tl.float32)
    count = tl.zeros([BK], tl.int32)
    loss = tl.zeros([BN], tl.float64)
    start = tl.program_id(0) % programs
    if AHEAD:
        coming = rows_of_tile(x + head * x_h, start, num_rows, dim, x_b, x_l, x_n, x_d, BN, BD)
    for tile in range(start, tiles, programs):
        if AHEAD:
            entry = coming
            coming = rows_of_tile(x + head * x_h, tile + programs, num_rows, dim, x_b, x_l, x_n, x_d, BN, BD)
        else:
            entry = rows_of_tile(x + head * x_h, tile, num_rows, dim, x_b, x_l, x_n, x_d, BN, BD)
        row = tl.cast(tile, tl.int64) * BN + tl.arange(0, BN)
        present = row < num_rows
        kept = present
        if MASK:
            kept = present & (tl.load(mask + head * m_h + row * m_n, mask=present, other=0) != 0)
        rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
        index = nearest_resident(entry, codebook, c_k, dim, centre, half_norm, CENTRE, NATIVE, DOT, BK, BD)
        scan = is_doubtful(doubt(entry, centre, limit, dim, L2, CENTRE), limit, L2)
        if scan:
            again = kept & rows_to_scan(entry, centre, limit, dim, L2, CENTRE)
            scanned, _ = scan_exactly(rows, x_d, again, codebook, c_k, num_codes, dim, L2, BN, 16)
            index = tl.where(again, scanned, index)
        index = tl.where(kept, index, -1)
        tl.store(indices + head * num_rows + row, tl.maximum(index, lowest).to(tl.int64), mask=present)
        inside = (index >= 0)[:, None] & (d < dim)[None, :]
        source = codebook + index.to(tl.int64)[:, None] * c_k + d[None, :]
        chosen = tl.load(source, mask=inside, other=float("nan")).to(tl.float32)
        value = chosen
        if MASK:
            value = tl.where(kept[:, None], value, 0.0)
        value = value.to(quantized.dtype.element_ty)
        place = (head * num_rows + row)[:, None] * dim + d[None, :]
        wide = entry.to(tl.float32)
        if COSINE:
            first, second = unit_scales(rows, x_d, index >= 0, dim, tl.float32, BN, BD)
            wide = wide * first[:, None] * second[:, None]
        residual = tl.where(inside, wide - chosen, 0.0)
        square = tl.sum(residual * residual, axis=1).to(tl.float64)
        if scan:
            square = squared_norm(residual)
        loss += square
        if NOISE:
            tl.store(codes + place, value, mask=present[:, None] & (d < dim)[None, :])
            direction = tl.load(noise + place, mask=inside, other=0.0).to(tl.float32)
            substitute = wide + noise_scale(square, squared_norm(direction))[:, None] * direction
            value = tl.where(inside, substitute.to(quantized.dtype.element_ty), value)
        tl.store(quantized + place, value, mask=present[:, None] & (d < dim)[None, :])
        member = index[None, :] == k[:, None]  # [BK, BN]
        total += grouped_sum(member, residual, SUM_DOT)
        count += tl.sum(member.to(tl.int32), axis=1)
    program = tl.program_id(0).to(tl.int64)
    if AVERAGES:
        copied = k < tl.where(program == 0, num_codes, 0)
        tl.store(sizes_before + k, tl.load(cluster_size + k, mask=copied, other=0.0), mask=copied)
    part = program * num_codes + k
    tl.store(parts + part[:, None] * dim + d[None, :], total, mask=(k < num_codes)[:, None] & (d < dim)[None, :])
    tl.store(part_counts + part, count, mask=k < num_codes)
    tl.store(part_losses + program * 2, tl.sum(loss, axis=0))
    tl.store(part_losses + program * 2 + 1, tl.sum(count, axis=0).to(tl.float64))


@triton.jit
def rows_of_tile(
    x: tensor, tile: tensor, num_rows: tensor, dim: tl.constexpr, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor,
    BN: tl.constexpr, BD: tl.constexpr,
) -> tensor:  # fmt: skip
    """The entries [BN, BD] of a tile of rows, 0 where there are none."""
    row, d = tl.cast(tile, tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    rows = first_entries(x, row, x_b, x_l, x_n)
    return tl.load(rows[:, None] + d[None, :] * x_d, mask=(row < num_rows)[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def noise_scale(residual: tensor, length: tensor) -> tensor:
    """r/‖v‖ + ε in fp32 from r² and ‖v‖² [BN] in fp64; 0 where v is."""
    scale = tl.sqrt(residual / tl.where(length > 0, length, 1.0)) + NOISE_FLOOR
    return tl.where(length > 0, scale, 0.0).to(tl.float32)


@triton.jit
def quantize_rows_kernel(
    x: tensor, codebook: tensor, mask: tensor, quantized: tensor, indices: tensor, part_losses: tensor, noise: tensor,
    codes: tensor, num_rows: tensor, dim: tensor, x_h: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor,
    c_h: tensor, c_k: tensor, m_h: tensor, m_n: tensor, tiles: tensor,
    MASK: tl.constexpr, COSINE: tl.constexpr, NOISE: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
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
    rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
    first = tl.full([BN], 1.0, WIDE)
    second = first
    if COSINE:
        first, second = unit_scales(rows, x_d, index >= 0, dim, WIDE, BN, BD)
    loss = tl.zeros([BN], tl.float64)
    length = tl.zeros([BN], tl.float64)
    for start in range(0, dim, BD):
        d = start + tl.arange(0, BD)
        inside = (index >= 0)[:, None] & (d < dim)[None, :]  # [BN, BD]
        entry = (
            tl.load(rows[:, None] + d[None, :] * x_d, mask=inside, other=0.0).to(WIDE)
            * first[:, None]
            * second[:, None]
        )
        chosen = tl.load(codebook + head * c_h + index[:, None] * c_k + d[None, :], mask=inside, other=0.0).to(WIDE)
        value = tl.where((index >= 0)[:, None], chosen, float("nan"))
        value = tl.where(kept[:, None], value, 0.0).to(quantized.dtype.element_ty)
        place = (head * num_rows + row)[:, None] * dim + d[None, :]
        tl.store(quantized + place, value, mask=present[:, None] & (d < dim)[None, :])
        loss += squared_norm(entry - chosen)
        if NOISE:
            tl.store(codes + place, value, mask=present[:, None] & (d < dim)[None, :])
            length += squared_norm(tl.load(noise + place, mask=inside, other=0.0).to(WIDE))
    if NOISE:
        scale = noise_scale(loss, length)[:, None].to(WIDE)
        for start in range(0, dim, BD):
            d = start + tl.arange(0, BD)
            inside = (index >= 0)[:, None] & (d < dim)[None, :]
            entry = tl.load(rows[:, None] + d[None, :] * x_d, mask=inside, other=0.0).to(WIDE)
            place = (head * num_rows + row)[:, None] * dim + d[None, :]
            direction = tl.load(noise + place, mask=inside, other=0.0).to(WIDE)
            value = entry * first[:, None] * second[:, None] + scale * direction
            tl.store(quantized + place, value.to(quantized.dtype.element_ty), mask=inside)
    part = tl.program_id(0).to(tl.int64) * 2
    tl.store(part_losses + part, tl.sum(loss, axis=0))
    tl.store(part_losses + part + 1, tl.sum((index >= 0).to(tl.float64), axis=0))


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, noise: Tensor | None, metric: str, precision: str, gradient: str
) -> tuple[Tensor, ...]:
    """``x`` (H, N, D) or (H, B, N / B, D), ``codebook`` (H, K, D), ``mask`` (H, N) bool or None, ``noise`` (H, N, D) or
    None.
    """
    codebook = unit_inner(codebook)
    heads, rows, (num_codes, dim) = x.shape[0], x.shape[1:-1].numel(), codebook.shape[1:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    outputs = Outputs(
        quantized=x.new_empty((heads, rows, dim)),
        indices=x.new_empty((heads, rows), dtype=torch.int64),
        commitment_loss=x.new_empty((heads,), dtype=wide),
        codebook_loss=x.new_empty((heads,), dtype=wide),
        counts=x.new_empty((heads, num_codes), dtype=torch.int64),
        sums=x.new_empty((heads, num_codes, dim), dtype=wide),
        residual_sums=x.new_empty((heads, num_codes, dim), dtype=wide),
        num_rows=x.new_empty((heads,), dtype=torch.int64),
        codes=x.new_empty((heads, 0 if noise is None else rows, dim)),
    )
    noise = None if noise is None else noise.contiguous()
    return quantize_into(outputs, x, codebook, mask, noise, metric, precision)


class Writing(NamedTuple):
    """How a forward writes its results; ``writes`` as of merge_sums_kernel."""

    writes: str = "statistics"
    averages: Averages | None = None
    loss_weight: float = 1.0

    @property
    def lowest(self) -> int:
        """The index of a row that is not finite: −1, and in a step 0, which the indices of ``out`` get in any case."""
        return -1 if self.writes == "statistics" else 0


STATISTICS = Writing()


def quantize_into(
    out: Outputs, x: Tensor, codebook: Tensor, mask: Tensor | None, noise: Tensor | None, metric: str, precision: str,
    how: Writing = STATISTICS,
) -> Outputs:  # fmt: skip
    """Writes to ``out`` and returns it, with other indices where the codebook does not fit one tile."""
    (_, rows, dim), num_codes, target = out.quantized.shape, codebook.shape[1], tuning.target_of(x.device)
    computed = arithmetic(x, codebook, metric, precision, target)
    tile = None if computed.exact else tuning.resident(target, rows, num_codes, dim, dim > 1 and x.stride(-1) != 1)
    with on_device(x):
        if tile is not None:
            _fused(x, codebook, mask, noise, metric, computed, tile, out, how)
            return out
        if how.averages is not None:
            how.averages.sizes_before.copy_(how.averages.cluster_size)
        indices, _ = nearest_code(x, codebook, metric, precision, False)
        out, written = out._replace(indices=indices), out.indices
        part_losses = _quantize_rows(x, codebook, mask, noise, metric, out)
        unit = x if metric != "cosine" else normalised(x.contiguous(), out.sums.dtype)[0]
        parts, offsets, tiles, segment = segment_sums(unit, codebook, indices, num_codes)
        _merge(parts, offsets, part_losses, codebook, out, tiles, segment, how)
        if how.lowest == 0:
            torch.clamp(indices, min=0, out=written)
        return out


class Outputs(NamedTuple):
    """What the operator returns, in its order."""

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    counts: Tensor
    sums: Tensor
    residual_sums: Tensor
    num_rows: Tensor
    codes: Tensor


def _merge(
    parts: Tensor, counts: Tensor, losses: Tensor, codebook: Tensor, out: Outputs, tiles: int, segment: int,
    how: Writing,
) -> None:  # fmt: skip
    scalars = (out.commitment_loss, out.codebook_loss, out.num_rows)
    merge_sums(
        parts, counts, losses, codebook, out.counts, out.sums, out.residual_sums, scalars, tiles, segment,
        how.averages, how.loss_weight, how.writes,
    )  # fmt: skip


def _fused(
    x: Tensor, codebook: Tensor, mask: Tensor | None, noise: Tensor | None, metric: str, computed: Arithmetic,
    tile: tuning.Tile, out: Outputs, how: Writing,
) -> None:  # fmt: skip
    (heads, rows, dim), num_codes, (x, strides) = out.quantized.shape, codebook.shape[1], rows_in_place(x)
    target, tiles = tuning.target_of(x.device), tuning.ceil_div(rows, tile.rows)
    sizes = (out.sums, out.sums) if how.averages is None else how.averages[:2]
    ahead = tuning.loads_ahead(target) and metric == "l2" and strides[-1] == 1  # else registers are too few
    # enough programs that none sums more than so many rows in fp32
    programs = max(1, min(tiles, max(persistent_programs(x.device), tuning.ceil_div(rows, tuning.ROWS_PER_SUM))))
    parts = x.new_empty((heads, programs, num_codes, dim), dtype=torch.float32)
    part_counts = x.new_empty((heads, programs, num_codes), dtype=torch.int32)
    part_losses = x.new_empty((heads, programs, 2), dtype=torch.float64)
    vector_quantize_fwd_kernel[(heads * programs,)](
        x, codebook, out.indices if mask is None else mask, out.quantized, out.indices, parts, part_counts, part_losses,
        x if noise is None else noise, out.codes, *sizes, rows, num_codes, dim, *strides, *codebook.stride()[:2],
        *((0, 0) if mask is None else mask.stride()), tiles, programs, how.lowest, metric == "l2",
        metric == "cosine", noise is not None, computed.centre, computed.native, computed.dot, fp32_product(target),
        mask is not None, how.averages is not None, ahead, tile.rows, tile.codes, tile.dim, **tile.options(),
    )  # fmt: skip
    _merge(parts, part_counts, part_losses, codebook, out, programs, 0, how)


def _quantize_rows(
    x: Tensor, codebook: Tensor, mask: Tensor | None, noise: Tensor | None, metric: str, out: Outputs
) -> Tensor:
    heads, rows, dim = out.quantized.shape
    tile = (tuning.elementwise if noise is None else tuning.by_row)(tuning.target_of(x.device), dim)
    x, strides = rows_in_place(x)
    tiles = tuning.ceil_div(rows, tile.rows)
    part_losses = x.new_empty((heads, tiles, 2), dtype=torch.float64)
    if heads * tiles:
        quantize_rows_kernel[(heads * tiles,)](
            x, codebook, out.indices if mask is None else mask, out.quantized, out.indices, part_losses,
            x if noise is None else noise, out.codes, rows, dim, *strides, *codebook.stride()[:2],
            *((0, 0) if mask is None else mask.stride()), tiles, mask is not None, metric == "cosine",
            noise is not None, tl.float64 if x.dtype == torch.float64 else tl.float32, tile.rows, tile.dim,
            **tile.options(),
        )  # fmt: skip
    return part_losses
