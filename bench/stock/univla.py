"""UniVLA's bottleneck: a codebook that learns by gradient; the caller computes both losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VectorQuantizer(nn.Module):
    """x (B, ..., D) -> z_q, straight-through; z, with the gradient to the codebook; x; indices (B, ...)."""

    usage: Tensor

    def __init__(self, num_latents: int, latent_dim: int, code_restart: bool = True) -> None:
        super().__init__()
        self.codebook = nn.Embedding(num_latents, latent_dim)
        self.codebook.weight.data.uniform_(-1.0 / num_latents, 1.0 / num_latents)
        self.register_buffer("usage", torch.zeros(num_latents), persistent=False)
        self.num_latents = num_latents
        self.code_restart = code_restart

    def update_usage(self, min_enc: Tensor) -> None:
        for index in min_enc:
            self.usage[index] = self.usage[index] + 1  # once per row of the first axis that has the code

    def random_restart(self) -> None:
        if not self.code_restart:
            return
        dead = torch.nonzero(self.usage < 1).squeeze(1)
        drawn = torch.randperm(self.num_latents)[0 : len(dead)]
        with torch.no_grad():
            self.codebook.weight[dead] = self.codebook.weight[drawn]

    def reset_usage(self) -> None:
        if self.code_restart:
            self.usage.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        indices = torch.argmin(torch.cdist(x, self.codebook.weight), dim=-1)
        z = self.codebook(indices)
        if not self.training or self.code_restart:
            self.update_usage(indices)
        return x + (z - x).detach(), z, x, indices
