"""The quantiser of tinyworlds, for latent actions (2 levels to an entry) and for video tokens (4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lamkernels.compat.base import Compat
from lamkernels.lookup_free import quantize_entries
from lamkernels.ops.finite_scalar_quantize.levels import EVEN


class FiniteScalarQuantizer(Compat):
    """tinyworlds' ``FiniteScalarQuantizer``: ``quantized = fsq(z)``, tanh(z) rounded to L values in [−1, 1].

    Args:
        latent_dim: D, the number of entries of a row.
        num_bins: L, the number of levels of each, 2 or more.

    Shape:
        z (..., D) -> quantized (..., D) in the dtype of z. A level is that of exact arithmetic. z = 0 lies half-way
        between two levels where L is even, and goes to the even one, as in torch.round: down for 2 levels, up for 4. A
        row that is not finite is quantised to NaN, where upstream takes an infinity for the outermost level.

    State:
        basis (D,) int64: the powers of L, the first entry changes the index fastest.

    Raises:
        ValueError: num_bins is below 2, with which upstream divides by zero.
    """

    upstream_names = ("FiniteScalarQuantizer",)
    basis: Tensor

    def __init__(self, latent_dim: int = 5, num_bins: int = 4) -> None:
        super().__init__()
        if num_bins < 2:
            raise ValueError(f"num_bins is {num_bins}; it must be at least 2")
        self.num_bins = num_bins
        self.levels_np = torch.tensor(latent_dim * [num_bins])
        self.codebook_size = num_bins**latent_dim
        self.register_buffer("basis", num_bins ** torch.arange(latent_dim))

    def forward(self, z: Tensor) -> Tensor:
        """Quantises z (..., D)."""
        return quantize_entries(z, (self.num_bins,) * z.shape[-1], EVEN)[0]

    def scale_and_shift(self, z: Tensor) -> Tensor:
        """[−1, 1] to [0, L − 1]."""
        return 0.5 * (z + 1) * (self.num_bins - 1)

    def unscale_and_unshift(self, z: Tensor) -> Tensor:
        """[0, L − 1] to [−1, 1]."""
        return 2 * z / (self.num_bins - 1) - 1

    def get_codebook_usage(self, quantized_z: Tensor) -> float:
        """How many different values there are, over L. Waits for the GPU."""
        values: Tensor = torch.unique(quantized_z)
        return values.shape[0] / self.num_bins

    def get_indices_from_latents(self, latents: Tensor, dim: int = -1) -> Tensor:
        """Indices (...,) int64 of quantised rows (..., D); summed as integers, so exact for any number of codes."""
        digits = self.scale_and_shift(latents).round().clamp(0, self.num_bins - 1).long()
        return (digits * self.basis.to(digits.device)).sum(dim)

    def get_latents_from_indices(self, indices: Tensor, dim: int = -1) -> Tensor:
        """Rows (..., D) of indices (...,) int64. ``dim`` is not used, as upstream's is not."""
        digits = indices[..., None].div(self.basis, rounding_mode="floor") % self.num_bins
        return self.unscale_and_unshift(digits)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        bins, basis = getattr(module, "num_bins", None), getattr(module, "basis", None)
        if not isinstance(bins, int) or bins < 2:
            return f"num_bins is {bins!r}; it must be an int of at least 2"
        if not isinstance(basis, Tensor) or basis.ndim != 1:
            return "it has no buffer basis of one axis"
        if not torch.equal(basis.cpu(), bins ** torch.arange(basis.shape[0])):
            return "basis is not the powers of num_bins"
        return None

    def probe(self) -> tuple[Any, ...]:
        shape = 2, 3, 5, self.basis.shape[0]
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.basis.device),)
