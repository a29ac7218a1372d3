"""``LFQ``: lookup-free quantisation as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lamkernels.lookup_free import ZEROS, Zero, check_bits, lookup_free_codes, lookup_free_quantize
from lamkernels.nn.indices import module_indices
from lamkernels.validation import (
    BACKENDS,
    Backend,
    check_integer,
    check_number,
    check_option,
    check_positive,
    check_weight,
)


class LFQ(nn.Module):
    """A lookup-free-quantisation bottleneck (Yu et al. 2024): ``quantized, indices, loss = lfq(x)``.

    The code of a row is the signs of its entries. In training mode

        loss = entropy_loss_weight · (sample_entropy − diversity_gamma · codebook_entropy)
               + commitment_loss_weight · commitment_loss

    with the terms of :func:`lamkernels.lookup_free_quantize`: confident rows, and all codes in use. In eval mode the
    loss is 0, and the codebook entropy, which costs 2·N·2^D operations, is not computed; nor is it with
    ``entropy_loss_weight`` or ``diversity_gamma`` of 0.

    Args:
        dim: D, the number of bits: rows have D entries, and there are 2^D codes.
        entropy_loss_weight: weight of both entropies in ``loss``.
        commitment_loss_weight: weight of the commitment loss in ``loss``.
        diversity_gamma: γ, weight of the codebook entropy against the sample entropy; −1 adds it instead.
        inv_temperature: β of the code distribution.
        codebook_scale: s, the magnitude of the codes' entries.
        zero: "negative" or "zero", as for :func:`lamkernels.lookup_free_quantize`.
        backend: as for :func:`lamkernels.nearest_code`.

    Shape:
        x (..., D) -> quantized (..., D) in the dtype of x, indices (...,) int64, loss () fp32. A row that is not finite
        is quantised to NaN and gets index 0 (−1 would trip the assertions of an embedding or a cross entropy).

    Raises:
        ValueError: an argument is out of its range, named in the message.
    """

    def __init__(
        self,
        dim: int,
        *,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        inv_temperature: float = 100.0,
        codebook_scale: float = 1.0,
        zero: Zero = "negative",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_integer("dim", dim)
        for name, value in (
            ("entropy_loss_weight", entropy_loss_weight),
            ("commitment_loss_weight", commitment_loss_weight),
        ):
            check_weight(name, value)
        check_number("diversity_gamma", diversity_gamma, math.isfinite, "finite")
        check_bits(dim, entropy_loss_weight != 0 and diversity_gamma != 0)
        check_positive("inv_temperature", inv_temperature)
        check_positive("codebook_scale", codebook_scale)
        check_option("zero", zero, ZEROS)
        check_option("backend", backend, BACKENDS)
        self.dim, self.codebook_size = dim, 2**dim
        self.entropy_loss_weight, self.commitment_loss_weight = entropy_loss_weight, commitment_loss_weight
        self.diversity_gamma, self.inv_temperature = diversity_gamma, inv_temperature
        self.codebook_scale, self.zero, self.backend = codebook_scale, zero, backend

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises x (..., D); ``mask`` (...,) bool is False for rows to leave out, which are quantised to zero."""
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., {self.dim})")
        diverse = self.entropy_loss_weight != 0 and self.diversity_gamma != 0
        out = lookup_free_quantize(
            x,
            scale=self.codebook_scale,
            inv_temperature=self.inv_temperature,
            zero=self.zero,
            mask=mask,
            codebook_entropy=self.training and diverse,
            backend=self.backend,
        )
        if not self.training:
            return out.quantized, module_indices(out.indices, mask), torch.zeros_like(out.commitment_loss)
        entropy = out.sample_entropy
        if out.codebook_entropy is not None:
            entropy = entropy - self.diversity_gamma * out.codebook_entropy
        loss = self.entropy_loss_weight * entropy + self.commitment_loss_weight * out.commitment_loss
        return out.quantized, module_indices(out.indices, mask), loss

    def indices_to_codes(self, indices: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The codes (..., D) of indices (...,) int64."""
        return lookup_free_codes(indices, self.dim, scale=self.codebook_scale, dtype=dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}"
