"""Moto's quantiser in plain torch."""

from __future__ import annotations

import os

from torch import nn

from .vector_quantizer2 import VectorQuantizer2Family


class VectorQuantizer2(VectorQuantizer2Family):
    """(z_q (b, n, D), indices, loss)."""

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

    def setup_remap(self, remap, unknown_index):
        self._remap_by(remap, unknown_index)

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        assert temp in (None, 1.0) and not rescale_logits and not return_logits
        closest = self.remap is not None and self.unknown_index == "closest"
        candidates = self.embedding(self.used) if closest else self.embedding.weight
        indices = self.distances(z.reshape(-1, self.e_dim), candidates).argmin(1)
        z_q = self.embedding(indices).reshape(z.shape)  # with "closest" a position, and not a code
        loss = self.loss(z, z_q)
        z_q = (z + (z_q - z).detach()).reshape(len(z), -1, z.shape[-1])
        if self.remap is not None and not closest:
            indices = self.remap_to_used(indices.reshape(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z_q.shape[:-1])
        return z_q, indices, loss

    def get_codebook_entry(self, indices):
        if self.remap is None:
            return self.embedding(indices)
        if self.unknown_index == "closest":
            return self.embedding(self.used)[indices]
        return self.embedding(self.unmap_to_all(indices.reshape(len(indices), -1)).reshape(-1))
