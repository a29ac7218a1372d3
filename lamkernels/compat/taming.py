"""The quantiser of taming-transformers and of its many copies (VQGAN, latent diffusion): channels come second."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from lamkernels.compat.vector_quantizer2 import VectorQuantizer2Family, check_for_gumbel
from lamkernels.eager import routed
from lamkernels.functional import quantize_channels


class VectorQuantizer2(VectorQuantizer2Family):
    """taming-transformers' ``VectorQuantizer2``: ``z_q, loss, (None, None, indices) = vq(z)``.

    Args:
        n_e: K, the number of codes, drawn from U(±1/K).
        e_dim: D, the number of channels.
        beta: β, weight of the codebook loss, or without ``legacy`` of the commitment loss.
        remap: None, or the path of an .npy file with the (R,) codes that are in use: indices are then positions in it.
        unknown_index: what a code that is not in it becomes: "random", "extra" (R), or an int.
        sane_index_shape: indices (b, h, w) instead of (N,).
        legacy: loss = commitment + β·codebook, or False for β·commitment + codebook.

    Shape:
        z (b, D, h, w) of any strides -> z_q (b, D, h, w), loss (), indices (N,) int64, with ``remap`` (N, 1), with
        ``sane_index_shape`` (b, h, w). Half precision z gives z_q and loss in the fp32 of the codebook; distances are
        fp32 under autocast too, which upstream has no guard against. A row that is not finite is quantised to NaN, gets
        index 0 and is in no loss, where upstream's loss is NaN.

    Raises:
        ValueError: an argument that upstream refuses, another shape, or an unknown ``unknown_index``.
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

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantises z."""
        check_for_gumbel(temp, rescale_logits, return_logits)
        if z.ndim != 4 or z.shape[1] != self.e_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; it must be (b, {self.e_dim}, h, w)")
        z, weight = self._as_computed(z)
        z_q, indices, loss = quantize_channels(z, weight, *self._weights)
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(z.shape[0], -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[0], *z.shape[2:])
        return routed(z_q, z), loss if loss.dtype == z.dtype else loss.to(z.dtype), (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """The codes (..., D) of indices; with ``shape`` (b, h, w, D) as (b, D, h, w). ``remap`` needs the shape."""
        return self._codebook_entry(indices, shape)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if hasattr(module, "setup_remap"):
            return "it has a setup_remap, by which Moto's differs from it"
        return super().refusal(module)

    def probe(self) -> tuple[Any, ...]:
        return (self._probe_rows(2, self.e_dim, 3, 5),)
