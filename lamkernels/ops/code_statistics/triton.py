"""code_statistics in Triton: exact counts and bitwise reproducible sums, without float atomics.

While all sums fit one tile, each persistent program adds up its own rows. Otherwise the rows are sorted by code, each
tile of sorted rows sums its runs, and run k of tile j is stored in slot j + k: both only grow along the sorted rows, so
every pair has a slot of its own. Either way one kernel merges the parts in a fixed order.
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
from lamkernels.ops.codebook_upkeep.triton import move_averages
from lamkernels.ops.triton_common import (
    finite_in_memory,
    first_entries,
    fp32_product,
    grouped_sum,
    is_finite,
    on_device,
    persistent_programs,
    rows_in_place,
)


@triton.jit
def code_sums_kernel(
    x: tensor, indices: tensor, parts: tensor, part_counts: tensor, num_rows: tensor, num_codes: tensor,
    dim: tl.constexpr, x_h: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor, i_h: tensor, i_n: tensor,
    tiles: tensor, programs: tensor,
    DOT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """parts (H, P, K, D) fp32 and part_counts (H, P, K) int32 of the rows of each program."""
    head = (tl.program_id(0) // programs).to(tl.int64)
    k = tl.arange(0, BK)
    d = tl.arange(0, BD)
    total = tl.zeros([BK, BD], tl.float32)
    count = tl.zeros([BK], tl.int32)
    for tile in range(tl.program_id(0) % programs, tiles, programs):
        row = tl.cast(tile, tl.int64) * BN + tl.arange(0, BN)
        code = tl.load(indices + head * i_h + row * i_n, mask=row < num_rows, other=-1)
        counted = (code >= 0) & (code < num_codes)  # [BN]
        source = first_entries(x + head * x_h, row, x_b, x_l, x_n)[:, None] + d[None, :] * x_d
        entry = tl.load(source, mask=counted[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)  # [BN, BD]
        counted = counted & (tl.min(is_finite(entry).to(tl.int32), axis=1) > 0)
        member = (code[None, :] == k[:, None]) & counted[None, :]  # [BK, BN]
        total += grouped_sum(member, tl.where(counted[:, None], entry, 0.0), DOT)
        count += tl.sum(member.to(tl.int32), axis=1)
    part = tl.program_id(0).to(tl.int64) * num_codes + k
    tl.store(parts + part[:, None] * dim + d[None, :], total, mask=(k < num_codes)[:, None] & (d < dim)[None, :])
    tl.store(part_counts + part, count, mask=k < num_codes)


@triton.jit
def row_keys_kernel(
    x: tensor, indices: tensor, keys: tensor, num_rows: tensor, num_codes: tensor, dim: tensor, x_h: tensor,
    x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor, i_h: tensor, i_n: tensor, tiles: tensor,
    BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """keys (H, N) int64: the index of each row that counts, −1 for the others."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
    code = tl.load(indices + head * i_h + row * i_n, mask=row < num_rows, other=-1)
    counted = (code >= 0) & (code < num_codes)
    rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
    counted = finite_in_memory(rows, x_d, counted, dim, BD)
    tl.store(keys + head * num_rows + row, tl.where(counted, code, -1), mask=row < num_rows)


@triton.jit
def segment_sums_kernel(
    x: tensor, codebook: tensor, keys: tensor, order: tensor, parts: tensor, num_rows: tensor, num_codes: tensor,
    dim: tensor, x_h: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor, c_h: tensor, c_k: tensor,
    tiles: tensor, chunks: tensor,
    RESIDUAL: tl.constexpr, DOT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """parts (H, T + K, D): slot j + k holds the sum of x, or of x − c_k, over the rows of code k in sorted tile j."""
    head = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    tile = ((tl.program_id(0) // chunks) % tiles).to(tl.int64)
    d = (tl.program_id(0) % chunks) * BD + tl.arange(0, BD)
    lane = tl.arange(0, BN)
    place = head * num_rows + tile * BN + lane
    key = tl.load(keys + place, mask=tile * BN + lane < num_rows, other=-1)
    row = tl.load(order + place, mask=key >= 0, other=0)
    inside = (key >= 0)[:, None] & (d < dim)[None, :]  # [BN, BD]
    wide = parts.dtype.element_ty
    rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
    value = tl.load(rows[:, None] + d[None, :] * x_d, mask=inside, other=0.0).to(wide)
    if RESIDUAL:
        value -= tl.load(codebook + head * c_h + key[:, None] * c_k + d[None, :], mask=inside, other=0.0).to(wide)
    member = (key[:, None] == key[None, :]) & (key >= 0)[None, :]  # [BN, BN]
    first = tl.min(tl.where(member, lane[None, :], BN), axis=1) == lane  # of its run in this tile
    slot = head * (tiles + num_codes) + tile + key
    total = grouped_sum(member, value, DOT)
    tl.store(parts + slot[:, None] * dim + d[None, :], total, mask=first[:, None] & inside)


@triton.jit
def merge_sums_kernel(
    parts: tensor, part_counts: tensor, part_losses: tensor, codebook: tensor, counts: tensor, sums: tensor,
    residual_sums: tensor, commitment_loss: tensor, codebook_loss: tensor, rows_in: tensor, sizes_before: tensor,
    cluster_size: tensor, code_sums: tensor, num_codes: tensor, dim: tensor, c_h: tensor, c_k: tensor,
    num_parts: tensor, num_losses: tensor, chunks: tensor, share: tensor, eps: tensor, loss_weight: tensor,
    SEGMENTS: tl.constexpr, RESIDUAL: tl.constexpr, WRITES: tl.constexpr, SEGMENT: tl.constexpr, BP: tl.constexpr,
    BD: tl.constexpr,
) -> None:  # fmt: skip
    """Adds up the parts of each code in fp64 and in a fixed order; finishes sums, and the losses where there are any.

    ``part_counts`` is (H, P, K) int32, or with SEGMENTS (H, K + 1) int64: where the rows of each code start and end.
    ``part_losses`` is (H, L, 2) fp64: Σ(x − q)² and the number of rows. ``num_parts`` is P, or the number of tiles.
    WRITES says what, beside the losses: all "statistics", the "residuals" alone, or the moving "averages" of the one
    codebook, into which the statistics go.
    """
    head = (tl.program_id(0) // (num_codes * chunks)).to(tl.int64)
    k = ((tl.program_id(0) // chunks) % num_codes).to(tl.int64)
    d = (tl.program_id(0) % chunks) * BD + tl.arange(0, BD)
    if SEGMENTS:
        start = tl.load(part_counts + head * (num_codes + 1) + k)
        stop = tl.load(part_counts + head * (num_codes + 1) + k + 1)
        count = stop - start
        low, high = start // SEGMENT, tl.where(count > 0, (stop + SEGMENT - 1) // SEGMENT, start // SEGMENT)
        base, step = head * (num_parts + num_codes) + k, 1
    else:
        count = tl.zeros([], tl.int64)
        low, high = tl.zeros([], tl.int64), tl.cast(num_parts, tl.int64)
        base, step = head * num_parts * num_codes + k, num_codes
    total = tl.zeros([BD], tl.float64)
    for first in range(low, high, BP):
        part = first + tl.arange(0, BP)
        slot = base + part * step  # [BP]
        source = parts + slot[:, None] * dim + d[None, :]
        value = tl.load(source, mask=(part < high)[:, None] & (d < dim)[None, :], other=0.0)  # [BP, BD]
        total += tl.sum(value.to(tl.float64), axis=0)
        if not SEGMENTS:
            count += tl.sum(tl.load(part_counts + slot, mask=part < high, other=0).to(tl.int64), axis=0)
    if WRITES == "statistics":
        tl.store(counts + head * num_codes + k, count)
    out = (head * num_codes + k) * dim + d
    if RESIDUAL:  # the sum of the rows of code k is n·c + R, without the cancellation of s − n·c
        if WRITES != "averages":
            tl.store(residual_sums + out, total.to(residual_sums.dtype.element_ty), mask=d < dim)
        # a code that is not finite has no rows, and 0 · NaN would not be 0
        code = tl.load(codebook + head * c_h + k * c_k + d, mask=d < dim, other=0.0).to(tl.float64)
        total += tl.where(count > 0, count.to(tl.float64) * code, 0.0)
        if tl.program_id(0) % (num_codes * chunks) == 0:
            finish_losses(part_losses, commitment_loss, codebook_loss, rows_in, head, dim, num_losses, loss_weight)
    if WRITES == "averages":
        _, rows = summed_losses(part_losses, head, num_losses)
        move_averages(
            codebook + k * c_k, sizes_before, cluster_size, code_sums, count.to(tl.float32), total.to(tl.float32), k, d,
            num_codes, dim, tl.where(rows > 0, share, 0.0), rows, eps,
        )  # fmt: skip
    elif WRITES == "statistics":
        tl.store(sums + out, total.to(sums.dtype.element_ty), mask=d < dim)


@triton.jit
def finish_losses(
    part_losses: tensor, commitment_loss: tensor, codebook_loss: tensor, rows_in: tensor, head: tensor, dim: tensor,
    num_losses: tensor, weight: tensor,
) -> None:  # fmt: skip
    total, num_rows = summed_losses(part_losses, head, num_losses)
    loss = (total / tl.maximum(num_rows * dim, 1.0)).to(commitment_loss.dtype.element_ty) * weight
    tl.store(commitment_loss + head, loss)
    tl.store(codebook_loss + head, loss)
    tl.store(rows_in + head, num_rows.to(tl.int64))


@triton.jit
def summed_losses(part_losses: tensor, head: tensor, num_losses: tensor) -> tensor:
    """Σ(x − q)² and the number of rows, () fp64."""
    lane = tl.arange(0, 256)
    total = tl.zeros([256], tl.float64)
    rows = tl.zeros([256], tl.float64)
    for first in range(0, num_losses, 256):
        part = head * num_losses + first + lane
        total += tl.load(part_losses + part * 2, mask=first + lane < num_losses, other=0.0)
        rows += tl.load(part_losses + part * 2 + 1, mask=first + lane < num_losses, other=0.0)
    return tl.sum(total, axis=0), tl.sum(rows, axis=0)


class Averages(NamedTuple):
    """The moving averages that a merge updates, of one codebook; fp32 and contiguous."""

    sizes_before: Tensor  # (K,): a copy of cluster_size
    cluster_size: Tensor  # (K,)
    code_sums: Tensor  # (K, D)
    share: float  # 1 − γ
    eps: float


def segment_sums(x: Tensor, codebook: Tensor | None, keys: Tensor, num_codes: int) -> tuple[Tensor, Tensor, int, int]:
    """Sums over runs of sorted rows: parts (H, T + K, D), offsets (H, K + 1) int64, T tiles, and rows of a tile."""
    (heads, rows), dim, target, (x, strides) = keys.shape, x.shape[-1], tuning.target_of(x.device), rows_in_place(x)
    tile = tuning.segments(target, dim, x.dtype)
    tiles, chunks = tuning.ceil_div(rows, tile.rows), tuning.ceil_div(dim, tile.dim)
    keys, order = torch.sort(keys, dim=-1, stable=True)
    bounds = torch.arange(num_codes + 1, device=x.device).expand(heads, -1)
    offsets = torch.searchsorted(keys, bounds.contiguous())
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = x.new_empty((heads, tiles + num_codes, dim), dtype=wide)
    if tiles:
        codes = x if codebook is None else codebook
        segment_sums_kernel[(heads * tiles * chunks,)](
            x, codes, keys, order, parts, rows, num_codes, dim, *strides, *codes.stride()[:2], tiles, chunks,
            codebook is not None, fp32_product(target), tile.rows, tile.dim, **tile.options(),
        )  # fmt: skip
    return parts, offsets, tiles, tile.rows


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.code_statistics`. ``x`` (H, N, D) or (H, B, N / B, D), ``indices`` (H, N) int64."""
    (x, row_strides), target = rows_in_place(x), tuning.target_of(x.device)
    (heads, rows), dim, wide = indices.shape, x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    counts = x.new_empty((heads, num_codes), dtype=torch.int64)
    sums = x.new_empty((heads, num_codes, dim), dtype=wide)
    if sums.numel() == 0:
        return counts, sums
    sizes, strides = (rows, num_codes, dim), (*row_strides, *indices.stride())
    tile = None if wide == torch.float64 else tuning.resident(target, *sizes)
    with on_device(x):
        if tile is not None:
            tiles = tuning.ceil_div(rows, tile.rows)
            programs = max(1, min(tiles, persistent_programs(x.device)))
            parts = x.new_empty((heads, programs, num_codes, dim), dtype=wide)
            part_counts = x.new_empty((heads, programs, num_codes), dtype=torch.int32)
            code_sums_kernel[(heads * programs,)](
                x, indices, parts, part_counts, *sizes, *strides, tiles, programs, fp32_product(target),
                tile.rows, tile.codes, tile.dim, **tile.options(),
            )  # fmt: skip
            merge_sums(parts, part_counts, None, None, counts, sums, None, (), programs, 0)
        else:
            keys, tile = (
                torch.empty_like(indices, memory_format=torch.contiguous_format),
                tuning.elementwise(target, dim),
            )
            tiles = tuning.ceil_div(rows, tile.rows)
            if tiles:
                row_keys_kernel[(heads * tiles,)](
                    x, indices, keys, *sizes, *strides, tiles, tile.rows, tile.dim, **tile.options()
                )
            parts, offsets, tiles, segment = segment_sums(x, None, keys, num_codes)
            merge_sums(parts, offsets, None, None, counts, sums, None, (), tiles, segment)
    return counts, sums


def merge_sums(
    parts: Tensor, part_counts: Tensor, part_losses: Tensor | None, codebook: Tensor | None, counts: Tensor,
    sums: Tensor, residual_sums: Tensor | None, losses: tuple[Tensor, ...], num_parts: int, segment: int,
    averages: Averages | None = None, loss_weight: float = 1.0, writes: str = "statistics",
) -> None:  # fmt: skip
    """``losses`` are (commitment_loss, codebook_loss, rows_in) or empty; ``segment`` is 0 for parts (H, P, K, D).

    ``writes`` as of the kernel: with "averages" these and the codebook are updated, and nothing but the losses is
    written; with "residuals" nothing but ``residual_sums`` and the losses.
    """
    heads, num_codes, dim = sums.shape
    entries = tuning.power(min(dim, 128))
    chunks = tuning.ceil_div(dim, entries)
    outputs = losses or (sums, sums, sums)  # a kernel argument has to be something
    strides = (0, 0) if codebook is None else codebook.stride()[:2]
    moved, rates = ((sums, sums, sums), (0.0, 0.0)) if averages is None else (averages[:3], averages[3:])
    merge_sums_kernel[(heads * num_codes * chunks,)](
        parts, part_counts, sums if part_losses is None else part_losses, sums if codebook is None else codebook,
        counts, sums, sums if residual_sums is None else residual_sums, *outputs, *moved, num_codes, dim, *strides,
        num_parts, 0 if part_losses is None else part_losses.shape[1], chunks, *rates,
        loss_weight, segment > 0, codebook is not None, writes, max(segment, 1), 32, entries,
        **tuning.PLAIN.options(),
    )  # fmt: skip
