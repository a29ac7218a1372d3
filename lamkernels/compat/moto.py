"""The bottleneck of Moto, the latent motion tokenizer: 128 codes of 32, eight to a motion."""

from __future__ import annotations

import math
import os
from typing import Any

from torch import Tensor, nn

from lamkernels.compat.vector_quantizer2 import VectorQuantizer2Family, check_for_gumbel
from lamkernels.eager import in_shape
from lamkernels.functional import nearest_code


class VectorQuantizer2(VectorQuantizer2Family):
    """Moto's ``VectorQuantizer2``: ``z_q, indices, loss = vq(z)``.

    Args:
        n_e: K, the number of codes, drawn from U(±1/K).
        e_dim: D, the size of a row.
        beta: β, weight of the codebook loss, or without ``legacy`` of the commitment loss.
        remap: None, or the path of an .npy file with the (R,) codes that are in use: indices are then positions in it.
        unknown_index: what a code that is not in it becomes: "random", "extra" (R) or an int; or "closest": only the
            codes in use are candidates. There upstream takes the position for a code, so that z_q and loss are those of
            code ``position`` of the whole codebook, not of ``used[position]``; so do they here. ``get_codebook_entry``
            is right.
        sane_index_shape: indices (b, n) instead of (N,).
        legacy: loss = commitment + β·codebook, or False for β·commitment + codebook.

    Shape:
        z (b, ..., D) of any strides -> z_q (b, n, D), indices (N,) int64, with ``remap`` (N, 1) but for "closest", with
        ``sane_index_shape`` (b, n), and loss (). Half precision z gives z_q and loss in the fp32 of the codebook, as
        upstream's arithmetic does. Distances are fp32 everywhere: upstream has no guard against autocast, which rounds
        their products to half precision and so merges codes.
        A row that is not finite is quantised to NaN, gets index 0 and is in no loss, where upstream's loss is NaN.

    Raises:
        ValueError: an argument that upstream refuses, a shape without rows of D, or an unknown ``unknown_index``.
    """

    upstream_names = ("VectorQuantizer2",)

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | os.PathLike[str] | None = None,
        unknown_index: int | str = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def setup_remap(self, remap: str | os.PathLike[str], unknown_index: int | str) -> None:
        """Remaps from now on, as the arguments of the constructor do."""
        self._set_remap(remap, unknown_index)

    @classmethod
    def _unknown_indices(cls) -> tuple[str, ...]:
        return "random", "extra", "closest"

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises z."""
        check_for_gumbel(temp, rescale_logits, return_logits)
        z, weight = self._as_computed(z)
        closest = self.remap is not None and self.unknown_index == "closest"
        z_q, loss, indices = self._quantize_among_used(z) if closest else self._quantize(z, weight)
        if z_q.ndim != 3:
            z_q = in_shape(z_q, (z.shape[0], math.prod(z.shape[1:-1]), z.shape[-1]))
        if self.remap is not None and not closest:
            indices = self.remap_to_used(indices.reshape(z.shape[0], -1)).reshape(-1, 1)
        return z_q, indices.reshape(z_q.shape[:-1]) if self.sane_index_shape else indices, loss

    def _quantize_among_used(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``_quantize``, for "closest": the code at the position of the nearest code in use, which is another."""
        rows = z.reshape(-1, self.e_dim)
        positions = nearest_code(rows, self.embedding(self.used)).clamp(min=0)
        codes = self.embedding(positions)
        losses = (rows - codes.detach()).square().mean(), (codes - rows.detach()).square().mean()
        loss = sum(weight * part for weight, part in zip(self._weights, losses, strict=True))
        return (rows + (codes - rows).detach()).reshape(z.shape), loss, positions

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """The codes (..., D) of indices (...,) int64; with ``remap`` of positions (B, ...), as (N, D)."""
        codes: Tensor
        if self.remap is not None and self.unknown_index == "closest":
            codes = self.embedding(self.used)[indices]
            return codes
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(indices.shape[0], -1)).reshape(-1)
        codes = self.embedding(indices)
        return codes

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if not hasattr(module, "setup_remap"):
            return "it has no setup_remap, by which Moto's differs from its ancestor"
        return super().refusal(module)

    def probe(self) -> tuple[Any, ...]:
        return (self._probe_rows(2, 3, self.e_dim),)
