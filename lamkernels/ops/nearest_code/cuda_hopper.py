"""nearest_code in CUDA C++ for Hopper (csrc/nearest_code_hopper.cu): many half rows, a codebook of any size.

Not yet measured on a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lamkernels.ops.cuda_common import HOPPER, THREADS, TYPES, launch, multiprocessors, pack

HALVES = (torch.float16, torch.bfloat16)
SOURCE = "nearest_code_hopper.cu"
ROWS, BLOCK = 256, 384  # rows that a block takes at a time, and its threads
SHARED, BARRIERS, MOST_STAGES = 227 * 1024, 128, 6
MAX_DIM, MAX_ROWS = 256, 2**31 - ROWS


class Sizes(NamedTuple):
    """Codes of a tile, its bytes, and the shared memory of a block, as in the source."""

    codes: int
    tile: int
    shared: int


@functools.cache
def sizes(dim: int) -> Sizes:
    """For rows of ``dim`` entries."""
    steps = -(-dim // 16)
    codes = 64 if steps > 8 else 128
    tile, rows = (32 * steps + 4) * codes, ROWS * (32 * steps + 16)
    stages = min(MOST_STAGES, (SHARED - BARRIERS - rows) // tile)
    return Sizes(codes, tile, BARRIERS + rows + stages * tile)


def defines(dtype: torch.dtype, dim: int) -> tuple[str, ...]:
    """How the source is told of its rows."""
    return f"-DPRODUCT_TYPE={TYPES[dtype]}", f"-DDIM={dim}"


def unfit(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str:
    """Why the kernels cannot serve these, or ""."""
    heads, rows, dim = x.shape[0], x.shape[1:-1].numel(), x.shape[-1]
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != HOPPER:
        return "only an H100, H200 or GH200 has more"
    if x.dtype not in HALVES or codebook.dtype != x.dtype:
        return "more codes need float16 or bfloat16 rows, and codes of that dtype"
    if dim % 8 or dim > MAX_DIM:
        return f"more codes need a number of entries that is a multiple of 8 up to {MAX_DIM}, not {dim}"
    if metric not in ("l2", "dot") or precision == "exact":
        return "more codes need metric 'l2' or 'dot', and precision 'default' or 'fast'"
    return "" if heads * max(rows, codebook.shape[1]) < MAX_ROWS else f"more codes need fewer than {MAX_ROWS} rows"


def nearest_code(x: Tensor, codebook: Tensor, metric: str, return_distance: bool) -> tuple[Tensor, Tensor]:
    """``x`` (H, N, D) or (H, B, N / B, D), ``codebook`` (H, K, D), N and K at least 1; what :func:`unfit` takes."""
    heads, rows, (num_codes, dim) = x.shape[0], x.shape[1:-1].numel(), codebook.shape[1:]
    codebook, x = codebook.contiguous(), x if _in_groups_of_16_bytes(x) else x.contiguous()
    of, single = sizes(dim), torch.float32
    code_tiles = -(-num_codes // of.codes)
    tiles = x.new_empty((heads, code_tiles, of.tile), dtype=torch.uint8)
    norms = x.new_empty((heads, code_tiles * of.codes), dtype=torch.float64)
    largest, limits = x.new_empty(norms.shape, dtype=single), x.new_empty((2, heads), dtype=single)
    indices = x.new_empty((heads, rows), dtype=torch.int64)
    distance = x.new_empty((heads, rows if return_distance else 0), dtype=single)
    groups = (x.stride(1), 1, 0) if x.ndim == 3 else (x.stride(1), x.shape[2], x.stride(2))
    arguments = pack(
        (
            *(t.data_ptr() for t in (x, codebook, tiles, norms, largest, limits, indices)),
            distance.data_ptr() if return_distance else 0, heads, rows, num_codes, code_tiles,
            x.stride(0), *groups, *codebook.stride()[:2], metric == "dot",
        ),
        (),
    )  # fmt: skip
    given = defines(x.dtype, dim)
    blocks = min(heads * -(-rows // ROWS), multiprocessors(x.device))
    for kernel, grid, shared, threads in (
        ("ready_codes", heads * code_tiles * of.codes // 8, 0, THREADS),
        ("ready_norms", heads, 8 * 20, THREADS),
        ("nearest_code", blocks, of.shared, BLOCK),
        ("finish_rows", heads * -(-rows // THREADS), 0, THREADS),
    ):
        launch(kernel, SOURCE, given, grid, arguments, shared, x.device, threads)
    return indices, distance


def _in_groups_of_16_bytes(x: Tensor) -> bool:
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
