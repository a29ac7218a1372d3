"""LAPO's bottleneck: codebooks that are moving averages, with the dimensions of a latent apart in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class VQConfig:
    """LAPO's own values."""

    num_codebooks: int = 2
    num_discrete_latents: int = 4
    emb_dim: int = 16
    num_embs: int = 64
    commitment_cost: float = 0.05
    decay: float = 0.999


class VQEmbeddingEMA(nn.Module):
    """x (b, codebooks·D·latents) -> z_q as x, loss (), perplexity (), indices (b, codebooks, latents, 1)."""

    embedding: Tensor
    ema_count: Tensor
    ema_weight: Tensor

    def __init__(self, cfg: Any, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.cfg, self.epsilon = cfg, epsilon
        embedding = torch.zeros(cfg.num_codebooks, cfg.num_embs, cfg.emb_dim)
        embedding.uniform_(-1 / cfg.num_embs * 5, 1 / cfg.num_embs * 5)
        self.register_buffer("embedding", embedding)
        self.register_buffer("ema_count", torch.zeros(cfg.num_codebooks, cfg.num_embs))
        self.register_buffer("ema_weight", self.embedding.clone())

    def forward_2d(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, channels, height, width = x.size()
        books, codes, dim = self.embedding.size()
        assert channels == books * dim
        x = x.view(batch, books, dim, height, width).permute(1, 0, 3, 4, 2)
        rows = x.detach().reshape(books, -1, dim)
        norms = torch.sum(self.embedding**2, dim=2).unsqueeze(1) + torch.sum(rows**2, dim=2, keepdim=True)
        indices = torch.argmin(torch.baddbmm(norms, rows, self.embedding.transpose(1, 2), alpha=-2.0), dim=-1)
        onehot = F.one_hot(indices, codes).float()
        quantized = torch.gather(self.embedding, 1, indices.unsqueeze(-1).expand(-1, -1, dim)).view_as(x)
        if self.training:
            decay = self.cfg.decay
            self.ema_count = decay * self.ema_count + (1 - decay) * torch.sum(onehot, dim=1)
            total = torch.sum(self.ema_count, dim=-1, keepdim=True)
            self.ema_count = (self.ema_count + self.epsilon) / (total + codes * self.epsilon) * total
            sums = torch.bmm(onehot.transpose(1, 2), rows)
            self.ema_weight = decay * self.ema_weight + (1 - decay) * sums
            self.embedding = self.ema_weight / self.ema_count.unsqueeze(-1)
        loss = self.cfg.commitment_cost * F.mse_loss(x, quantized.detach())
        quantized = quantized.detach() + (x - x.detach())
        usage = torch.mean(onehot, dim=1)
        perplexity = torch.exp(-torch.sum(usage * torch.log(usage + 1e-10), dim=-1))
        return (
            quantized.permute(1, 0, 4, 2, 3).reshape(batch, channels, height, width),
            loss,
            perplexity.sum(),
            indices.view(books, batch, height, width).permute(1, 0, 2, 3),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cfg, batch = self.cfg, len(x)
        x = x.view(batch, cfg.num_codebooks * cfg.emb_dim, cfg.num_discrete_latents, 1)
        z_q, loss, perplexity, indices = self.forward_2d(x)
        return z_q.view(batch, -1), loss, perplexity, indices

    def inds_to_z_q(self, indices: Tensor) -> Tensor:
        assert not self.training
        books, _, dim = self.embedding.size()
        batch, _, height, width = indices.shape
        flat = indices.permute(1, 0, 2, 3).reshape(books, -1, 1).expand(-1, -1, dim)
        codes = torch.gather(self.embedding, 1, flat).view(books, batch, height, width, dim)
        return codes.permute(1, 0, 4, 2, 3).reshape(batch, books * dim, height, width)
