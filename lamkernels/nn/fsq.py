"""``FSQ``: finite scalar quantisation as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lamkernels.lookup_free import finite_scalar_codes, finite_scalar_quantize
from lamkernels.validation import BACKENDS, Backend, check_levels, check_option


class FSQ(nn.Module):
    """A finite-scalar-quantisation bottleneck (Mentzer et al. 2023): ``quantized, indices, loss = fsq(x)``.

    The codebook is the grid of all combinations of levels: there is nothing to learn, to initialise or to replace, and
    ``loss`` is zero. The formula is that of :func:`lamkernels.finite_scalar_quantize`.

    Args:
        levels: the number of levels of each column, such as [8, 5, 5, 5] for 1000 codes.
        symmetric: as for :func:`lamkernels.finite_scalar_quantize`; take it with two levels in a column.
        backend: as for :func:`lamkernels.nearest_code`.

    Shape:
        x (..., len(levels)) -> quantized (..., len(levels)) in the dtype of x, indices (...,) int64, loss () fp32.
        A row that is not finite is quantised to NaN and gets index 0 (−1 would trip the assertions of an embedding or a
        cross entropy).

    Raises:
        TypeError: levels are not integers.
        ValueError: levels are out of range, or the backend is unknown.
    """

    def __init__(self, levels: Sequence[int], *, symmetric: bool = False, backend: Backend = "auto") -> None:
        super().__init__()
        self.levels = check_levels(levels)
        check_option("backend", backend, BACKENDS)
        self.symmetric, self.backend = symmetric, backend
        self.dim, self.codebook_size = len(self.levels), math.prod(self.levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises x (..., D)."""
        quantized, indices = finite_scalar_quantize(x, self.levels, symmetric=self.symmetric, backend=self.backend)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        return quantized, indices.clamp(min=0), loss

    def indices_to_codes(self, indices: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The codes (..., D) of indices (...,) int64."""
        return finite_scalar_codes(indices, self.levels, symmetric=self.symmetric, dtype=dtype)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, symmetric={self.symmetric}"
