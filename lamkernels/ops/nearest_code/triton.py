"""nearest_code in Triton.

A codebook that fits one tile stays resident in persistent programs that compute its centre and norms themselves: one
launch. A larger one is first made ready (centred, padded, its norms), then streamed tile by tile. "exact" and fp64
rows are a plain fp64 scan. Rows whose fp32 arithmetic might overflow are scanned again in fp64 by the same program.
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
from lamkernels.ops.nearest_code.triton_codebook import ready_codebook
from lamkernels.ops.triton_common import (
    Arithmetic,
    arithmetic,
    chosen_score,
    doubt,
    first_entries,
    is_doubtful,
    must_scan,
    nearest_resident,
    on_device,
    persistent_programs,
    resident_norms,
    rows_in_place,
    rows_to_scan,
    scan_exactly,
    unit_inner,
    unit_scales,
)

SCANNED = 32  # rows that are decided in fp64 at a time


@triton.jit
def nearest_code_resident_kernel(
    x: tensor, codebook: tensor, indices: tensor, distance: tensor, num_rows: tensor, num_codes: tensor,
    dim: tl.constexpr, x_h: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor, c_h: tensor, c_k: tensor,
    tiles: tensor, programs: tensor,
    L2: tl.constexpr, COSINE: tl.constexpr, CENTRE: tl.constexpr, NATIVE: tl.constexpr, DOT: tl.constexpr,
    DISTANCE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
) -> None:  # fmt: skip
    head = (tl.program_id(0) // programs).to(tl.int64)
    codebook += head * c_h
    centre, half_norm, limit = resident_norms(codebook, c_k, num_codes, dim, L2, CENTRE, BK, BD)
    d = tl.arange(0, BD)
    found = tl.zeros([BN, BD], tl.int32) if L2 else tl.zeros([BN], tl.int32)
    # without a loop inside, so that the next tiles are on their way while one is worked on
    for tile in range(tl.program_id(0) % programs, tiles, programs):
        row = tl.cast(tile, tl.int64) * BN + tl.arange(0, BN)
        present = row < num_rows
        rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
        entries = tl.load(rows[:, None] + d[None, :] * x_d, mask=present[:, None] & (d < dim)[None, :], other=0.0)
        found = tl.maximum(found, doubt(entries, centre, limit, dim, L2, CENTRE))
        index = nearest_resident(entries, codebook, c_k, dim, centre, half_norm, CENTRE, NATIVE, DOT, BK, BD)
        store_nearest(
            index, rows, x_d, row, present, codebook, c_k, indices + head * num_rows, distance + head * num_rows, dim,
            L2, COSINE, DISTANCE, BN, BD,
        )  # fmt: skip
    if is_doubtful(found, limit, L2):
        tl.debug_barrier()  # what follows overwrites what other threads have stored
        for tile in range(tl.program_id(0) % programs, tiles, programs):
            for part in range(0, BN, BS):
                row = tl.cast(tile, tl.int64) * BN + part + tl.arange(0, BS)
                present = row < num_rows
                rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
                entries = tl.load(
                    rows[:, None] + d[None, :] * x_d, mask=present[:, None] & (d < dim)[None, :], other=0.0
                )
                again = present & rows_to_scan(entries, centre, limit, dim, L2, CENTRE)
                decide_exactly(
                    rows, x_d, row, again, codebook, c_k, indices + head * num_rows, distance + head * num_rows,
                    num_codes, dim, L2, COSINE, DISTANCE, BS, BD,
                )  # fmt: skip


@triton.jit
def store_nearest(
    index: tensor, rows: tensor, step: tensor, row: tensor, present: tensor, codebook: tensor, stride: tensor,
    indices: tensor, distance: tensor, dim: tensor,
    L2: tl.constexpr, COSINE: tl.constexpr, DISTANCE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """Stores the index and, where asked for, the score of each row that is present."""
    tl.store(indices + row, index.to(tl.int64), mask=present)
    if DISTANCE:
        score = chosen_score(rows, step, tl.where(present, index, -1), codebook, stride, dim, L2, BN, BD)
        if COSINE:
            first, second = unit_scales(rows, step, present & (index >= 0), dim, tl.float32, BN, BD)
            score = score * first * second
        tl.store(distance + row, tl.where(index >= 0, score, float("nan")), mask=present)


@triton.jit
def decide_exactly(
    rows: tensor, step: tensor, row: tensor, wanted: tensor, codebook: tensor, stride: tensor, indices: tensor,
    distance: tensor, num_codes: tensor, dim: tensor,
    L2: tl.constexpr, COSINE: tl.constexpr, DISTANCE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """As :func:`store_nearest`, of the wanted rows by a scan in fp64."""
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        index, best = scan_exactly(rows, step, wanted, codebook, stride, num_codes, dim, L2, BN, 16)
        tl.store(indices + row, index.to(tl.int64), mask=wanted)
        if DISTANCE:
            if not L2:
                best = -best
            score = best.to(tl.float32)
            if COSINE:
                first, second = unit_scales(rows, step, wanted & (index >= 0), dim, tl.float32, BN, BD)
                score = score * first * second
            tl.store(distance + row, tl.where(index >= 0, score, float("nan")), mask=wanted)


@triton.jit
def nearest_code_streamed_kernel(
    x: tensor, codebook: tensor, codes: tensor, centre: tensor, half_norm: tensor, limit: tensor, indices: tensor,
    distance: tensor, num_rows: tensor, num_codes: tensor, dim: tensor, padded_codes: tensor, padded_dim: tensor,
    x_h: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor, c_h: tensor, c_k: tensor, tiles: tensor,
    L2: tl.constexpr, COSINE: tl.constexpr, CENTRE: tl.constexpr, NATIVE: tl.constexpr, DOT: tl.constexpr,
    DISTANCE: tl.constexpr, ONE_CHUNK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    BS: tl.constexpr,
) -> None:  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
    present = row < num_rows
    rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
    codes += head * padded_codes * padded_dim
    half_norm += head * padded_codes
    centre += head * padded_dim
    bound = tl.load(limit + head)
    if L2:
        found = tl.zeros([BN, BD], tl.int32)
        for start in range(0, dim, BD):
            entry = centred_rows(rows, x_d, present, centre, start, dim, CENTRE, False, BD)
            found = tl.maximum(found, entry.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    else:
        found = scanned_rows(rows, x_d, present, centre, bound, dim, L2, CENTRE, BN, BD).to(tl.int32)
    doubtful = is_doubtful(found, bound, L2)
    best = tl.full([BN], float("inf"), tl.float32)
    index = tl.full([BN], -1, tl.int32)
    entry = centred_rows(rows, x_d, present, centre, 0, dim, CENTRE, NATIVE, BD)  # [BN, BD]
    for first in range(0, num_codes, BK):
        k = first + tl.arange(0, BK)
        code = codes + k.to(tl.int64)[None, :] * padded_dim  # [1, BK]
        product = tl.zeros([BN, BK], tl.float32)
        if ONE_CHUNK:
            code_tile = tl.load(code + tl.arange(0, BD)[:, None])  # [BD, BK]
            product = tl.dot(entry, code_tile, product, input_precision=DOT)
        else:
            for start in range(0, dim, BD):
                chunk = centred_rows(rows, x_d, present, centre, start, dim, CENTRE, NATIVE, BD)
                code_tile = tl.load(code + start + tl.arange(0, BD)[:, None])
                product = tl.dot(chunk, code_tile, product, input_precision=DOT)
        score = tl.load(half_norm + k)[None, :] - product  # [BN, BK]
        tile_best = tl.min(score, axis=1)
        tile_index = tl.min(tl.where(score == tile_best[:, None], k[None, :], 2147483647), axis=1)
        better = tile_best < best
        index = tl.where(better, tile_index, index)
        best = tl.where(better, tile_best, best)
    store_nearest(
        index, rows, x_d, row, present, codebook + head * c_h, c_k, indices + head * num_rows,
        distance + head * num_rows, dim, L2, COSINE, DISTANCE, BN, BD,
    )  # fmt: skip
    if doubtful:
        tl.debug_barrier()  # what follows overwrites what other threads have stored
        for part in range(0, BN, BS):
            some = (tl.program_id(0) % tiles).to(tl.int64) * BN + part + tl.arange(0, BS)
            few = first_entries(x + head * x_h, some, x_b, x_l, x_n)
            again = (some < num_rows) & scanned_rows(few, x_d, some < num_rows, centre, bound, dim, L2, CENTRE, BS, BD)
            decide_exactly(
                few, x_d, some, again, codebook + head * c_h, c_k, indices + head * num_rows,
                distance + head * num_rows, num_codes, dim, L2, COSINE, DISTANCE, BS, BD,
            )  # fmt: skip


@triton.jit
def scanned_rows(
    rows: tensor, step: tensor, present: tensor, centre: tensor, limit: tensor, dim: tensor,
    L2: tl.constexpr, CENTRE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> tensor:  # fmt: skip
    """Whether fp32 must not decide each row [BN], of any length."""
    largest = tl.zeros([BN], tl.float32)
    for start in range(0, dim, BD):
        size = tl.abs(centred_rows(rows, step, present, centre, start, dim, CENTRE, False, BD).to(tl.float32))
        largest = tl.maximum(largest, tl.max(tl.where(size <= limit, size, float("inf")), axis=1))
    return must_scan(largest, limit, dim, L2)


@triton.jit
def centred_rows(
    rows: tensor, step: tensor, present: tensor, centre: tensor, start: tensor, dim: tensor,
    CENTRE: tl.constexpr, NATIVE: tl.constexpr, BD: tl.constexpr,
) -> tensor:  # fmt: skip
    d = start + tl.arange(0, BD)
    entry = tl.load(rows[:, None] + d[None, :] * step, mask=present[:, None] & (d < dim)[None, :], other=0.0)
    if not NATIVE:
        entry = entry.to(tl.float32)
    if CENTRE:
        entry = entry - tl.load(centre + d)[None, :]
    return entry


@triton.jit
def nearest_code_exact_kernel(
    x: tensor, codebook: tensor, indices: tensor, distance: tensor, num_rows: tensor, num_codes: tensor, dim: tensor,
    x_h: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor, c_h: tensor, c_k: tensor, tiles: tensor,
    L2: tl.constexpr, DISTANCE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
    present = row < num_rows
    rows = first_entries(x + head * x_h, row, x_b, x_l, x_n)
    index, best = scan_exactly(rows, x_d, present, codebook + head * c_h, c_k, num_codes, dim, L2, BN, BK)
    tl.store(indices + head * num_rows + row, index.to(tl.int64), mask=present)
    if DISTANCE:
        if not L2:
            best = -best
        score = tl.where(index >= 0, best, float("nan")).to(distance.dtype.element_ty)
        tl.store(distance + head * num_rows + row, score, mask=present)


def nearest_code(
    x: Tensor, codebook: Tensor, metric: str, precision: str, return_distance: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.nearest_code`. ``x`` (H, N, D) or (H, B, N / B, D), ``codebook`` (H, K, D)."""
    codebook, (x, row_strides) = unit_inner(codebook), rows_in_place(x)
    heads, rows, (codes, dim) = x.shape[0], x.shape[1:-1].numel(), codebook.shape[1:]
    indices = x.new_empty((heads, rows), dtype=torch.int64)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    distance = x.new_empty((heads, rows if return_distance else 0), dtype=wide)
    if indices.numel() == 0:
        return indices, distance
    target = tuning.target_of(x.device)
    how = arithmetic(x, codebook, metric, precision, target)
    sizes = (rows, codes, dim)
    strides = (*row_strides, *codebook.stride()[:2])
    tile = tuning.lookup(target, *sizes, how.native, row_strides[4] != 1)
    with on_device(x):
        if how.exact:
            tile = tuning.exact(target)
            tiles = tuning.ceil_div(rows, tile.rows)
            nearest_code_exact_kernel[(heads * tiles,)](
                x, codebook, indices, distance, *sizes, *strides, tiles, metric == "l2", return_distance,
                tile.rows, tile.codes, **tile.options(),
            )  # fmt: skip
        elif tile is not None:
            tiles = tuning.ceil_div(rows, tile.rows)
            share = persistent_programs(x.device) * tuning.programs(tile) // tuning.PROGRAMS
            programs = min(tiles, max(1, share))
            nearest_code_resident_kernel[(heads * programs,)](
                x, codebook, indices, distance, *sizes, *strides, tiles, programs, metric == "l2",
                metric == "cosine", how.centre, how.native, how.dot, return_distance, tile.rows, tile.codes, tile.dim,
                min(tile.rows, SCANNED), **tile.options(),
            )  # fmt: skip
        else:
            _streamed(x, codebook, indices, distance, strides, metric, how)
    return indices, distance


def _streamed(
    x: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor, strides: tuple[int, ...], metric: str,
    how: Arithmetic,
) -> None:  # fmt: skip
    (heads, rows), (num_codes, dim) = indices.shape, codebook.shape[1:]
    product = x.dtype if how.native else torch.float32
    tile = tuning.streamed(tuning.target_of(x.device), num_codes, dim, product, apart=strides[4] != 1)
    precision = "tf32x3" if how.dot == "split" else how.dot
    ready = ready_codebook(codebook, tile, metric == "l2", how.centre, product)
    tiles = tuning.ceil_div(rows, tile.rows)
    nearest_code_streamed_kernel[(heads * tiles,)](
        x, codebook, *ready, indices, distance, rows, num_codes, dim, *ready.codes.shape[1:],
        *strides, tiles, metric == "l2", metric == "cosine", how.centre, how.native,
        precision, distance.numel() > 0, dim <= tile.dim, tile.rows, tile.codes, tile.dim, min(tile.rows, SCANNED),
        **tile.options(),
    )  # fmt: skip
