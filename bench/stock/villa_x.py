"""villa-X's quantiser in plain torch."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from .vector_quantizer2 import VectorQuantizer2Family


class VectorQuantizer2(VectorQuantizer2Family):
    """(z_q, loss or (loss, entropy), (None, None, indices)); fp32 under autocast on a GPU."""

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | os.PathLike[str] | None = None,
        unknown_index: int | str = "random",
        sane_index_shape: bool = False,
        legacy: bool = False,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)

    @property
    def codebook(self) -> Tensor:
        return self.embedding.weight

    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
    def forward(self, z, temp=None, rescale_logits=False, return_logits=False, use_entropy_loss=False):
        assert temp in (None, 1.0) and not rescale_logits and not return_logits
        d = self.distances(z.reshape(-1, self.e_dim), self.embedding.weight)
        indices = d.argmin(1)
        z_q = self.embedding(indices).reshape(z.shape)
        loss = self.loss(z, z_q)
        if use_entropy_loss:
            loss = loss, self.entropy_loss(-d)
        z_q = z + (z_q - z).detach()
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[0], z.shape[2], z.shape[3])
        return z_q, loss, (None, None, indices)

    def entropy_loss(self, affinity, loss_type="softmax", temperature=0.01, ratio=0.1):
        logits = affinity.reshape(-1, affinity.shape[-1]) / temperature
        p, log_p = F.softmax(logits, -1), F.log_softmax(logits + 1e-5, -1)
        target = p
        if loss_type == "argmax":
            target = p - (p - F.one_hot(logits.argmax(-1), logits.shape[-1]).to(p)).detach()
        mean = target.mean(0)
        of_mean = -(mean * torch.log(mean + 1e-5)).sum()
        of_rows = -(target * log_p).sum(-1).mean()
        return ratio * (of_rows - of_mean)

    def get_codebook_entry(self, indices, shape):
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        z_q = self.embedding(indices)
        return z_q if shape is None else z_q.reshape(shape).permute(0, 3, 1, 2).contiguous()
