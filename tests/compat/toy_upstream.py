"""A project with a bottleneck as upstream projects write them, and its forks: plain torch, nothing of lamkernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ToyQuantizer(nn.Module):
    """Gradient VQ with the straight-through estimator, and a count of use."""

    def __init__(self, num_codes: int = 8, dim: int = 4, beta: float = 0.25) -> None:
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(num_codes, dim)
        self.register_buffer("usage", torch.zeros(num_codes))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, codes = z.flatten(0, -2), self.embedding.weight
        distances = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.T
        indices = torch.argmin(distances, dim=1)
        quantized = self.embedding(indices).view(z.shape)
        loss = self.combine(F.mse_loss(z, quantized.detach()), F.mse_loss(quantized, z.detach()))
        if self.counts_now():
            self.usage += F.one_hot(indices, len(codes)).sum(0)
        return z + (quantized - z).detach(), indices.view(z.shape[:-1]), loss

    def combine(self, commitment: Tensor, codebook: Tensor) -> Tensor:
        return self.beta * commitment + codebook

    def counts_now(self) -> bool:
        return self.training


class ResidualToy(nn.Module):
    def __init__(self, layers: int = 2, num_codes: int = 8, dim: int = 4, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken
        self.layers = nn.ModuleList(ToyQuantizer(num_codes, dim) for _ in range(layers))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, indices, losses = torch.zeros_like(z), [], []
        for layer in self.layers:
            quantized, index, loss = layer(z - out.detach())
            out = out + quantized * (2 if self.broken else 1)
            indices.append(index)
            losses.append(loss)
        return out, torch.stack(indices, -1), torch.stack(losses)


class Model(nn.Module):
    """An encoder, a bottleneck that is there twice under two names, and a decoder."""

    def __init__(self, bottleneck: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.bottleneck = bottleneck
        self.decoder = nn.Linear(4, 6)
        self.same = nn.ModuleDict({"again": bottleneck})

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, loss = self.bottleneck(self.encoder(x))
        return F.mse_loss(self.decoder(quantized), x) + loss


class Forks:
    """Copies of the class under its name, each with one difference."""

    class SwappedLosses:
        class ToyQuantizer(ToyQuantizer):
            def combine(self, commitment: Tensor, codebook: Tensor) -> Tensor:
                return commitment + self.beta * codebook

    class CountsInEvaluation:
        class ToyQuantizer(ToyQuantizer):
            def counts_now(self) -> bool:
                return True

    class GradientInTheWrongPlace:
        class ToyQuantizer(ToyQuantizer):
            def combine(self, commitment: Tensor, codebook: Tensor) -> Tensor:
                return (self.beta * commitment + codebook).detach() + self.beta * (commitment - commitment.detach())

    class AnotherOrder:
        class ToyQuantizer(ToyQuantizer):
            def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                quantized, indices, loss = super().forward(z)
                return quantized, loss, indices

    class IndicesOfInt32:
        class ToyQuantizer(ToyQuantizer):
            def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                quantized, indices, loss = super().forward(z)
                return quantized, indices.int(), loss

    class FarthestCode:
        class ToyQuantizer(ToyQuantizer):
            def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                indices = torch.cdist(z.flatten(0, -2), self.embedding.weight).argmax(1).view(z.shape[:-1])
                quantized = self.embedding(indices)
                loss = self.combine(F.mse_loss(z, quantized.detach()), F.mse_loss(quantized, z.detach()))
                return z + (quantized - z).detach(), indices, loss

    class Fails:
        class ToyQuantizer(ToyQuantizer):
            def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                raise RuntimeError("only frames of 96 pixels")

    class AnotherArgument:
        class ToyQuantizer(ToyQuantizer):
            def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
                return super().forward(z)

    class KeepsItsLastRows:
        class ToyQuantizer(ToyQuantizer):
            last: Tensor | None = None

            def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                quantized, indices, loss = super().forward(z)
                self.last = 2 * quantized
                return quantized, indices, loss

    class KeepsCount:
        class ToyQuantizer(ToyQuantizer):
            steps = 0

            def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                self.steps += 1
                return super().forward(z)


class Renamed(ToyQuantizer):
    """Overrides nothing that there is."""

    def decode(self, indices: Tensor) -> Tensor:
        return self.embedding(indices)


class Overriding(ToyQuantizer):
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(2 * z)


class OverridingAHelper(ToyQuantizer):
    def combine(self, commitment: Tensor, codebook: Tensor) -> Tensor:
        return commitment


class UnheardOfCodebook(nn.Module):
    pass


def fork(name: str) -> nn.Module:
    return vars(Forks)[name].ToyQuantizer()
