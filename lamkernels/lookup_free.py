"""Public functions of the quantisers without a learned codebook: finite scalar (FSQ) and lookup-free (LFQ)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lamkernels.ops.finite_scalar_quantize.levels import bound, strides
from lamkernels.ops.finite_scalar_quantize.op import finite_scalar_quantize as _finite_scalar_quantize
from lamkernels.validation import BACKENDS, FLOATS, Backend, check_float, check_indices, check_levels, check_option


def finite_scalar_quantize(
    x: Tensor, levels: Sequence[int], *, symmetric: bool = False, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Finite scalar quantisation (FSQ, Mentzer et al. 2023): every entry is bounded and rounded to one of few levels.

    With L levels, h = (L − 1)(1 + 1e-3) / 2, o = ½ for even L and 0 for odd L, and s = atanh(o / h), an entry z becomes
    round(tanh(z + s)·h − o) / ⌊L / 2⌋ (appendix A.1 of the paper). The gradient passes straight through the rounding:
    that of an entry is h / ⌊L / 2⌋ · (1 − tanh²(z + s)). Two levels lie far from symmetric here, with their edge at
    z = −3.8; ``symmetric`` puts it at 0.

    Entries are compared with the points where the bound crosses a rounding edge, computed in fp64, so that the level is
    that of exact arithmetic on the stored value on every backend and in every dtype.

    Args:
        x: (..., D); float32, float16, bfloat16 or float64, any strides.
        levels: the number of levels of each of the D columns, each at least 2, their product below 2⁶³.
        symmetric: the L values (2j − L + 1) / (L − 1) in [−1, 1] instead, the nearest to tanh(z), upwards from a tie
            (Parker et al. 2024, section 3.2).
        backend: as for :func:`nearest_code`.

    Returns:
        quantized (..., D) in the dtype of x, and indices (...,) int64: the sum of the levels' positions times the
        product of the levels before, so that the first column changes fastest. A row that is not finite is quantised
        to NaN, has index −1 and a gradient of zero.

    Raises:
        TypeError: x is not a tensor of a supported dtype, or levels are not integers.
        ValueError: the levels do not fit each other or x, or an option is unknown.
        RuntimeError: the backend asked for cannot run here.
    """
    check_float("x", x)
    counts = check_levels(levels)
    check_option("backend", backend, BACKENDS)
    if x.shape[-1] != len(counts):
        raise ValueError(f"x has rows of {x.shape[-1]} entries and there are {len(counts)} levels; they must be equal")
    quantized, indices = _finite_scalar_quantize(x.reshape(1, -1, len(counts)), counts, symmetric, backend)
    return quantized.reshape(x.shape), indices.reshape(x.shape[:-1])


def finite_scalar_codes(
    indices: Tensor, levels: Sequence[int], *, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The code of each index of :func:`finite_scalar_quantize`, NaN where the index is −1.

    Args:
        indices: (...,) int64 in [−1, K), K the product of the levels.
        levels: as for :func:`finite_scalar_quantize`.
        symmetric: as for :func:`finite_scalar_quantize`.
        dtype: of the codes.

    Returns:
        (..., D), equal to what :func:`finite_scalar_quantize` returns for rows of ``dtype``.

    Raises:
        TypeError: indices is not int64, levels are not integers, or dtype is not a supported one.
        ValueError: levels are out of range.
        IndexError: on the CPU, an index is below −1 or not below K.
    """
    check_indices(indices)
    counts = check_levels(levels)
    _check_code_range(indices, math.prod(counts))
    _check_dtype(dtype)
    columns = []
    for count, stride in zip(counts, strides(tuple(counts)), strict=True):
        column = bound(count, symmetric)
        position = indices.div(stride, rounding_mode="floor") % count
        columns.append((position.double() - column.offset) / column.half_width)
    return torch.stack(columns, -1).to(dtype).masked_fill((indices < 0)[..., None], torch.nan)


def _check_code_range(indices: Tensor, num_codes: int) -> None:
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
        low, high = (int(v) for v in torch.aminmax(indices))
        if low < -1 or high >= num_codes:
            raise IndexError(f"indices range from {low} to {high}; they must be in [-1, {num_codes - 1}]")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}; it must be float32, float16, bfloat16 or float64")
