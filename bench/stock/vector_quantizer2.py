"""What the plain ``VectorQuantizer2`` of villa-X and of Moto share: constructor, remapping and loss."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor, nn


class VectorQuantizer2Family(nn.Module):
    """A codebook in an ``nn.Embedding``; codes can be renumbered by a list of those in use."""

    used: Tensor

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | os.PathLike[str] | None,
        unknown_index: int | str,
        sane_index_shape: bool,
        legacy: bool,
    ) -> None:
        super().__init__()
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.legacy = legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.remap = None
        self.re_embed = n_e
        if remap is not None:
            self._remap_by(remap, unknown_index)
        self.sane_index_shape = sane_index_shape

    def _remap_by(self, remap: str | os.PathLike[str], unknown_index: int | str) -> None:
        self.remap = remap
        self.register_buffer("used", torch.tensor(np.load(remap)))
        count = len(self.used)
        self.re_embed = count + 1 if unknown_index == "extra" else count
        self.unknown_index = count if unknown_index == "extra" else unknown_index

    def remap_to_used(self, inds: Tensor) -> Tensor:
        assert inds.dim() > 1
        used = self.used.tolist()
        flat = inds.reshape(-1).tolist()
        positions = [used.index(code) if code in used else None for code in flat]
        holes = positions.count(None)
        if self.unknown_index == "random":
            fill = iter(torch.randint(0, self.re_embed, (holes,)).tolist())
        else:
            fill = iter([self.unknown_index] * holes)
        return torch.tensor([next(fill) if p is None else p for p in positions], device=inds.device).reshape(inds.shape)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        assert inds.dim() > 1
        if self.re_embed > len(self.used):
            inds = torch.where(inds < len(self.used), inds, torch.zeros_like(inds))
        return self.used.to(inds.device)[inds]

    def distances(self, rows: Tensor, codes: Tensor) -> Tensor:
        """(N, K), kept by autograd."""
        return (rows**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * torch.einsum("nd,kd->nk", rows, codes)

    def loss(self, z: Tensor, z_q: Tensor) -> Tensor:
        commitment, codebook = torch.mean((z_q.detach() - z) ** 2), torch.mean((z_q - z.detach()) ** 2)
        return commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
