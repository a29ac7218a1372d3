"""covariance in CUDA C++ for Hopper (csrc/covariance_hopper.cu): fp32 rows as products of bf16 halves.

For wide rows: a block computes 128 × 256 entries of a scatter. Not yet measured on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lamkernels import tuning
from lamkernels.ops.covariance.reference import pairs
from lamkernels.ops.cuda_common import HOPPER, THREADS, launch, multiprocessors, pack

SOURCE, DEFINES = "covariance_hopper.cu", ("-DPRODUCT_TYPE=bf16",)
ROWS, TALL, WIDE, BLOCK = 32, 128, 256, 384  # of a stage, columns of a tile, and threads, as in the source
SHARED = 128 + 4 * 2 * ROWS * 2 * (TALL + WIDE) + 4 * (TALL + WIDE) + 64
SAMPLE = 1024  # rows that the provisional mean is computed from


class Factor(NamedTuple):
    """Rows (H, P, D), their provisional shift (H, D) fp32, and their mean (H, D) fp64 once known."""

    x: Tensor
    shift: Tensor
    mean: Tensor


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
    first, second = pairs(x, y, lag)
    inside = pair_weights(first, second, weights)
    total = inside.sum(1)
    left, xx = _scatter(first, inside, total)
    if second.shape[2] == 0:
        heads = len(first)
        return total, left.mean, total.new_zeros((heads, 0)), xx, xx[..., :0].clone(), xx[..., :0, :0].clone()
    right, yy = _scatter(second, inside, total)
    xy = partial_products(left, right, inside, False)[0]
    xy -= (total[:, None] * (left.mean - left.shift))[:, :, None] * (right.mean - right.shift)[:, None, :]
    return total, left.mean, right.mean, xx, xy, yy


def _provisional_shift(x: Tensor, weights: Tensor) -> Tensor:
    """The mean of evenly spaced rows of positive weight (H, D), to 1/16 of the spread of a column.

    So integers and pixels keep their grid, and their products stay exact.
    """
    step = max(1, x.shape[1] // SAMPLE)
    inside = weights[:, ::step, None] > 0
    sample, count = x[:, ::step].double(), inside.sum(1).clamp(min=1)
    mean = torch.where(inside, sample, 0.0).sum(1) / count
    spread = (torch.where(inside, sample - mean[:, None], 0.0).square().sum(1) / count).sqrt()
    grid = torch.exp2(spread.where(spread > 0, 1.0).log2().ceil()) / 16
    return torch.where(spread > 0, (mean / grid).round() * grid, mean).float()


def _scatter(x: Tensor, weights: Tensor, total: Tensor) -> tuple[Factor, Tensor]:
    """The rows with their mean, and their centred scatter (H, D, D) fp64."""
    shift = _provisional_shift(x, weights)
    rows = Factor(x, shift, shift.double())
    products, sums = partial_products(rows, rows, weights, True)
    step = sums / total.where(total > 0, 1.0)[:, None]
    root = step * total.sqrt()[:, None]
    upper = (products - root[:, :, None] * root[:, None, :]).triu()
    return rows._replace(mean=rows.mean + step), upper + upper.triu(1).transpose(1, 2)


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
    splits = tuning.splits(tiles, num_pairs // (4 * ROWS), multiprocessors(left.x.device))
    size = -(-num_pairs // (splits * ROWS)) * ROWS
    parts = weights.new_zeros((heads, splits, dim, other))
    sums, low_squares = weights.new_zeros((2, heads, splits, dim))
    if parts.numel() and num_pairs:
        arguments = _arguments(
            left.x, right.x, weights, shifts=(left.shift, right.shift), out=(parts, sums, low_squares),
            symmetric=symmetric, splits=splits, size=size,
        )  # fmt: skip
        kernel = "column_products" if symmetric else "cross_products"
        launch(kernel, SOURCE, DEFINES, heads * splits * tiles, arguments, SHARED, weights.device, BLOCK)
    products = parts.sum(1)
    if symmetric:
        products.diagonal(dim1=1, dim2=2).add_(low_squares.sum(1))
    return products, sums.sum(1)


def num_tiles(dim: int, other: int, symmetric: bool) -> int:
    """Of 128 × 256 entries, of a symmetric scatter those that hold entries of the upper triangle."""
    down, across = -(-dim // TALL), -(-other // WIDE)
    return sum(across - i * TALL // WIDE for i in range(down)) if symmetric else down * across


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
