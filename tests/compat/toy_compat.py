"""The fused forms of the toy project."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lamkernels as lk
from lamkernels.compat import Compat, SwapReport


class ToyFused(Compat):
    """Under the upstream constructor it would be used as it is; the tests swap it in."""

    upstream_names = ("ToyQuantizer",)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = lk.vector_quantize(z, self.embedding.weight)
        if self.training:
            self.usage += out.counts
        return out.quantized, out.indices, self.beta * out.commitment_loss + out.codebook_loss

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if not hasattr(module, "beta"):
            return "it has no beta"
        return None if module.embedding.weight.ndim == 2 else "the codebook has heads"

    def probe(self) -> tuple[Any, ...]:
        codes = self.embedding.weight
        return (torch.randn(4, 3, codes.shape[1], generator=torch.Generator().manual_seed(0)).to(codes),)


class ResidualToyFused(Compat):
    upstream_names = ("ResidualToy",)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, indices, losses = torch.zeros_like(z), [], []
        for layer in self.layers:
            quantized, index, loss = ToyFused.forward(layer, z - out.detach())
            out = out + quantized
            indices.append(index)
            losses.append(loss)
        return out, torch.stack(indices, -1), torch.stack(losses)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        return None

    def probe(self) -> tuple[Any, ...]:
        return ToyFused.probe(self.layers[0])


class ToyFusedOfAnotherProject(ToyFused):
    """For a project with a bottleneck of the same name and structure that returns in another order."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = super().forward(z)
        return quantized, loss, indices


def why(report: SwapReport) -> str:
    assert not report.swapped and len(report.refused) == 1, report
    return report.refused[0].why
