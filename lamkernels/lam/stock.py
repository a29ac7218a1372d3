"""The bottleneck as the public LAM code bases write it: plain torch, a distance matrix, a one-hot matrix.

It is the other half of the demonstration. Constructor, state_dict, initialisation and EMA rule are those of
:class:`lamkernels.VectorQuantize`, and both draw the same random numbers, so that one seed gives one training run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.nn.dead_codes import BITS, uniform


class StockVectorQuantize(nn.Module):
    """EMA vector quantisation with the straight-through estimator (van den Oord et al. 2017).

    Args:
        dim: D, the size of a row.
        codebook_size: K, the number of codes.
        decay: γ of the moving averages.
        eps: ε of their Laplace smoothing.
        init: "uniform", U(±1/K), or "kmeans", on the first training batch.
        kmeans_iters: Lloyd iterations of that.
        dead_code_threshold: codes with a smaller moving count are replaced by rows of the batch; 0 never replaces.
        commitment_weight: weight of the commitment loss.

    Shape:
        x (..., D) float -> quantized (..., D), indices (...,) int64, loss ().
    """

    codebook: Tensor
    cluster_size: Tensor
    code_sums: Tensor
    initialized: Tensor
    draws: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        init: str = "uniform",
        kmeans_iters: int = 10,
        dead_code_threshold: float = 0.0,
        commitment_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if init not in ("uniform", "kmeans"):
            raise ValueError(f"init is {init!r}; it must be one of 'uniform', 'kmeans'")
        self.dim, self.codebook_size, self.decay, self.eps = dim, codebook_size, decay, eps
        self.kmeans_iters, self.dead_code_threshold = kmeans_iters, dead_code_threshold
        self.commitment_weight = commitment_weight
        codebook = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        self.register_buffer("codebook", codebook)
        self.register_buffer("code_sums", codebook.clone())
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("initialized", torch.tensor(init == "uniform"))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises x (..., D)."""
        rows = x.reshape(-1, self.dim)  # (N, D)
        if self.training and not self.initialized:
            self._kmeans(rows.detach())
        indices = self._distances(rows, self.codebook).argmin(dim=1)
        onehot = F.one_hot(indices, self.codebook_size).type_as(rows)  # (N, K)
        quantized = (onehot @ self.codebook).view_as(x)
        loss = self.commitment_weight * F.mse_loss(x, quantized.detach())
        if self.training:
            self._update(rows.detach(), onehot)
        return x + (quantized - x).detach(), indices.view(x.shape[:-1]), loss

    @staticmethod
    def _distances(rows: Tensor, codes: Tensor) -> Tensor:
        return rows.pow(2).sum(dim=1, keepdim=True) - 2 * rows @ codes.t() + codes.pow(2).sum(dim=1)  # (N, K)

    @torch.no_grad()
    def _update(self, rows: Tensor, onehot: Tensor) -> None:
        self.cluster_size.lerp_(onehot.sum(dim=0), 1 - self.decay)
        self.code_sums.lerp_(onehot.t() @ rows, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) * (total / (total + self.codebook_size * self.eps))
        self.codebook.copy_(self.code_sums / smoothed[:, None])
        if self.dead_code_threshold > 0:
            self.draws += 1
            drawn = rows[(uniform(self.draws, self.codebook_size)[0] * rows.shape[0]) >> BITS]
            dead = self.cluster_size < self.dead_code_threshold
            if dead.any():
                self.codebook[dead] = drawn[dead]
                self.code_sums[dead] = drawn[dead] * self.dead_code_threshold
                self.cluster_size[dead] = self.dead_code_threshold

    @torch.no_grad()
    def _kmeans(self, rows: Tensor) -> None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**53, ())))
        order = torch.randperm(rows.shape[0], generator=generator).to(rows.device)
        codes = rows[order[torch.arange(self.codebook_size, device=rows.device) % rows.shape[0]]]
        for _ in range(self.kmeans_iters):
            onehot = F.one_hot(self._distances(rows, codes).argmin(dim=1), self.codebook_size).type_as(rows)
            counts = onehot.sum(dim=0)[:, None]
            codes = torch.where(counts > 0, onehot.t() @ rows / counts.clamp(min=1), codes)
        self.codebook.copy_(codes)
        self.code_sums.copy_(codes)
        self.cluster_size.fill_(1.0)
        self.initialized.fill_(True)
