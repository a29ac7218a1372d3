"""Moments of few rows on the CPU, one kernel in fp64: to plan the partition of :mod:`numba` would take longer."""

# mypy: allow-untyped-defs, no-check-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined,call-arg"
from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.covariance.products import APART, DEPTH
from lamkernels.ops.covariance.tiles import TILE, add_products, panel_width
from lamkernels.ops.nearest_code.numba import FLAGS, elements
from lamkernels.ops.parallel import compiled, launch
from lamkernels.ops.simd import at, fetch_add, stored_type, widen, words

FEW = 4096  # rows, which "default" multiplies in fp64 as well
WORK = 1 << 22  # multiply-adds, of one thread


def suits(x: Tensor) -> bool:
    """Whether x (H, N, D) has few rows, whose products cannot overflow in fp64."""
    _, rows, dim = x.shape
    return rows < FEW and rows * dim * dim <= WORK and x.dtype != torch.float64 and x.stride(2) == 1


@njit(**FLAGS)
def _moments_of_heads(p, stored):
    """Parameters: 2 rows, 3 and 4 their strides, 5 heads, 6 N, 7 D, 8 weights (H,), 9 means (H, D), 10 (H, D, D)."""
    a = carray(p, (11,))
    rows, dim, width = a[6], a[7], panel_width(np.float64(0))
    padded = (dim + width - 1) // width * width
    stride = padded + APART
    inside, packed = np.empty(rows, np.bool_), np.zeros(padded * DEPTH)
    while True:
        head = fetch_add(a, 0)
        if head >= a[5]:
            return
        first, mean = a[2], elements(a[9], head * dim, dim, np.float64(0))
        mean[:] = 0.0
        count = 0
        for n in range(rows):
            row = elements(first, head * a[3] + n * a[4], dim, stored)
            check = 0.0
            for d in range(dim):
                check += widen(row[d]) * 0.0  # NaN from a NaN or an infinity
            inside[n] = check == 0.0
            if inside[n]:
                count += 1
                for d in range(dim):
                    mean[d] += widen(row[d])
        mean /= max(count, 1)
        sums = np.zeros(padded * stride)
        for start in range(0, rows, DEPTH):
            depth = 0
            for n in range(start, min(start + DEPTH, rows)):
                if inside[n]:
                    row = elements(first, head * a[3] + n * a[4], dim, stored)
                    for column in range(0, dim, width):
                        place = (column * DEPTH) + depth * width - column
                        for d in range(column, min(column + width, dim)):
                            packed[place + d] = widen(row[d]) - mean[d]
                    depth += 1
            if depth > 0:
                for j in range(0, dim, width):
                    for i in range(0, min(dim, j + width), TILE):
                        left = at(packed, i // width * width * DEPTH + i % width)
                        add_products(left, at(packed, j * DEPTH), depth, at(sums, i * stride + j), stride)
        elements(a[8], head, 1, np.float64(0))[0] = count
        scatter = elements(a[10], head * dim * dim, dim * dim, np.float64(0))
        for i in range(dim):
            for j in range(i, dim):
                scatter[i * dim + j] = sums[i * stride + j]
                scatter[j * dim + i] = sums[i * stride + j]


def _moments(p):
    _moments_of_heads(words(p), stored_type(p))


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (H,), means (H, D) and scatters (H, D, D), fp64, of the finite rows of x (H, N, D), where it `suits`."""
    heads, rows, dim = x.shape
    weight, mean, scatter = (
        torch.empty(shape, dtype=torch.float64, device="cpu") for shape in ((heads,), (heads, dim), (heads, dim, dim))
    )
    outputs = (out.data_ptr() for out in (weight, mean, scatter))
    parameters = [x.data_ptr(), x.stride(0), x.stride(1), heads, rows, dim, *outputs]
    launch(compiled(_moments, x.dtype), parameters, heads, heads * rows * dim * dim)
    return weight, mean, scatter
