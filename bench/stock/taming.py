"""taming-transformers' quantiser in plain torch."""

from __future__ import annotations

import os

from torch import nn

from .vector_quantizer2 import VectorQuantizer2Family


class VectorQuantizer2(VectorQuantizer2Family):
    """(z_q (b, D, h, w), loss, (None, None, indices))."""

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

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        assert temp in (None, 1.0) and not rescale_logits and not return_logits
        z = z.permute(0, 2, 3, 1).contiguous()
        indices = self.distances(z.reshape(-1, self.e_dim), self.embedding.weight).argmin(1)
        z_q = self.embedding(indices).reshape(z.shape)
        loss = self.loss(z, z_q)
        z_q = (z + (z_q - z).detach()).permute(0, 3, 1, 2).contiguous()
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[:3])
        return z_q, loss, (None, None, indices)

    def get_codebook_entry(self, indices, shape):
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        z_q = self.embedding(indices)
        return z_q if shape is None else z_q.reshape(shape).permute(0, 3, 1, 2).contiguous()
