"""tinyworlds' quantiser in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FiniteScalarQuantizer(nn.Module):
    """tanh, scaled to [0, L − 1], rounded with a straight-through gradient, scaled back to [−1, 1]."""

    def __init__(self, latent_dim: int = 5, num_bins: int = 4) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.levels_np = torch.tensor([num_bins] * latent_dim)
        self.codebook_size = num_bins**latent_dim
        self.register_buffer("basis", torch.tensor([num_bins**d for d in range(latent_dim)]))

    def scale_and_shift(self, z: Tensor) -> Tensor:
        return (z + 1) / 2 * (self.num_bins - 1)

    def unscale_and_unshift(self, z: Tensor) -> Tensor:
        return z / (self.num_bins - 1) * 2 - 1

    def forward(self, z: Tensor) -> Tensor:
        bounded = self.scale_and_shift(z.tanh())
        return self.unscale_and_unshift(bounded + (bounded.round() - bounded).detach())

    def get_codebook_usage(self, quantized_z: Tensor) -> float:
        return len(torch.unique(quantized_z)) / self.num_bins

    def get_indices_from_latents(self, latents: Tensor, dim: int = -1) -> Tensor:
        digits = torch.clamp(torch.round(self.scale_and_shift(latents)), 0, self.num_bins - 1)
        return torch.sum(digits * self.basis, dim=dim).long()

    def get_latents_from_indices(self, indices: Tensor, dim: int = -1) -> Tensor:
        return self.unscale_and_unshift(indices.unsqueeze(-1) // self.basis % self.num_bins)
