"""Normalised rows in torch, for what runs once a codebook or outside the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lamkernels.ops.constants import COSINE_EPS


def unit_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """x / ‖x‖ of rows (..., D) in a dtype. The norm is taken in fp64, which no entry of fp32 overflows, and clamped."""
    return F.normalize(rows.double(), dim=-1, eps=COSINE_EPS).to(dtype)


def unit_or_nan(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, but one that is not finite becomes NaN as a whole, without a gradient."""
    finite = vectors.isfinite().all(-1, keepdim=True)
    return torch.where(finite, unit_rows(torch.where(finite, vectors, 0.0), dtype), torch.nan)
