"""covariance in CUDA C++ for Hopper (csrc/covariance_hopper.cu): fp32 rows as three products of bf16 halves.

For wide rows: a block computes 128 × 256 entries of a scatter. Not yet measured on a GPU.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lamkernels.ops.covariance.gpu import Factor, moments
from lamkernels.ops.cuda_common import HOPPER, THREADS, launch, multiprocessors, pack

SOURCE, DEFINES = "covariance_hopper.cu", ("-DPRODUCT_TYPE=bf16",)
ROWS, TALL, WIDE, BLOCK = 32, 128, 256, 384  # of a stage, columns of a tile, and threads, as in the source
SHARED = 128 + 4 * 2 * ROWS * 2 * (TALL + WIDE) + 4 * (TALL + WIDE) + 64
MOST_WAVES = 8


def unfit(x: Tensor, y: Tensor | None, precision: str) -> str:
    """Why the kernels cannot serve these, saying what they serve, or ""."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != HOPPER:
        return "backend 'cuda' has a covariance for the H100, H200 and GH200 only; 'triton' serves this GPU"
    if x.dtype != torch.float32 or precision != "default":
        return (
            f"backend 'cuda' takes float32 rows and precision 'default' for a covariance, not {x.dtype} and "
            f"{precision!r}; 'triton' does"
        )
    if x.shape[-1] % 4 or (y is not None and y.shape[-1] % 4):
        return "backend 'cuda' takes a multiple of 4 columns for a covariance; 'triton' takes any number"
    return ""


def covariance(x: Tensor, y: Tensor | None, weights: Tensor | None, lag: int, precision: str) -> tuple[Tensor, ...]:
    """See :func:`lamkernels.moments`. ``x`` (H, N, D), ``y`` (H, N, E) or None, ``weights`` (H, max(N − lag, 0))."""
    if reason := unfit(x, y, precision):
        raise ValueError(reason)
    rows = (t if t is None or _in_groups_of_16_bytes(t) else t.contiguous() for t in (x, y))
    x, y = rows  # type: ignore[assignment]
    return moments(x, y, weights, lag, torch.float32, pair_weights, partial_products)


def pair_weights(first: Tensor, second: Tensor, given: Tensor | None) -> Tensor:
    """The weight (H, P) fp64 of each pair of rows (H, P, D) and (H, P, E); 0 for one that is out."""
    weights = first.new_empty(first.shape[:2], dtype=torch.float64)
    if weights.numel():
        arguments = _arguments(first, second, weights, given=given, symmetric=second.shape[2] == 0)
        launch("pair_weights", SOURCE, DEFINES, -(-weights.numel() // 8), arguments, 0, first.device, THREADS)
    return weights


def partial_products(left: Factor, right: Factor, weights: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Σ w (x − shift)(y − shift)ᵀ (H, D, E), or its upper triangle, and Σ w (x − shift) (H, D), both fp64."""
    (heads, num_pairs, dim), other = left.x.shape, right.x.shape[2]
    tiles = num_tiles(dim, other, symmetric)
    splits = num_splits(tiles, num_pairs, multiprocessors(left.x.device))
    size = -(-num_pairs // (splits * ROWS)) * ROWS
    parts = weights.new_zeros((heads, splits, dim, other))
    sums, low_squares = weights.new_zeros((2, heads, splits, dim))
    if parts.numel() and num_pairs:
        arguments = _arguments(
            left.x, right.x, weights, shifts=(left.shift, right.shift), out=(parts, sums, low_squares),
            symmetric=symmetric, splits=splits, size=size,
        )  # fmt: skip
        launch("column_products", SOURCE, DEFINES, heads * splits * tiles, arguments, SHARED, weights.device, BLOCK)
    products = parts.sum(1)
    if symmetric:
        products.diagonal(dim1=1, dim2=2).add_(low_squares.sum(1))
    return products, sums.sum(1)


def num_tiles(dim: int, other: int, symmetric: bool) -> int:
    """Of 128 × 256 entries, of a symmetric scatter those that hold entries of the upper triangle."""
    down, across = -(-dim // TALL), -(-other // WIDE)
    return sum(across - i * TALL // WIDE for i in range(down)) if symmetric else down * across


@functools.cache
def num_splits(tiles: int, num_pairs: int, multiprocessors: int) -> int:
    """How many ranges of rows: as few blocks as leave the last wave nearly full. Of the shape and the device alone."""
    most = max(1, min(num_pairs // (4 * ROWS), MOST_WAVES * multiprocessors // tiles))
    return max(range(1, most + 1), key=lambda splits: (_filled(tiles * splits, multiprocessors), -splits))


def _filled(blocks: int, multiprocessors: int) -> float:
    """The share of multiprocessors that blocks keep busy, in steps of 2 %."""
    return math.floor(50 * blocks / (-(-blocks // multiprocessors) * multiprocessors))


def _arguments(
    x: Tensor, y: Tensor, weights: Tensor, *, given: Tensor | None = None, shifts: tuple[Tensor, ...] = (),
    out: tuple[Tensor, ...] = (), symmetric: bool, splits: int = 0, size: int = 0,
) -> bytes:  # fmt: skip
    return pack(
        (
            x.data_ptr(), y.data_ptr(), 0 if given is None else given.data_ptr(), weights.data_ptr(),
            *((t.data_ptr() for t in (*shifts, *out)) if shifts else (0,) * 5), *x.shape, y.shape[2],
            *x.stride()[:2], *y.stride()[:2], *((0, 0) if given is None else given.stride()), symmetric, splits, size,
        ),
        (),
    )  # fmt: skip


def _in_groups_of_16_bytes(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % 4 == 0 and x.stride(1) % 4 == 0
