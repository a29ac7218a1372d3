"""The bottlenecks that the experiments compare, all of one form: ``z, indices or None, loss = bottleneck(x)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lamkernels.lam.model import GaussianBottleneck, NoBottleneck
from lamkernels.nn import FSQ, SimVQ, VectorQuantize

COMMITMENT = 0.25  # weight of the commitment loss (van den Oord et al. 2017)
STAGES = 2  # of a residual quantiser


class ResidualQuantize(nn.Module):
    """Residual vector quantisation (Zeghidour et al. 2021, SoundStream): each stage quantises what those before left.

    Args:
        stages: x (N, D) -> code (N, D), indices (N,), loss (), such as :class:`lamkernels.VectorQuantize`.

    Shape:
        x (N, D) -> the sum of the codes (N, D), whose gradient passes straight through to x; indices (N, stages) int64;
        the sum of the losses ().
    """

    def __init__(self, stages: list[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, chosen, loss = torch.zeros_like(x), [], x.new_zeros(())
        for stage in self.stages:
            code, indices, own = stage(x - total)
            total = total + code.detach()
            loss = loss + own
            chosen.append(indices)
        return total + (x - x.detach()), torch.stack(chosen, 1), loss


def _vq(**options: Any) -> Callable[[int, int], VectorQuantize]:
    def make(dim: int, codebook_size: int) -> VectorQuantize:
        return VectorQuantize(
            dim, codebook_size, decay=0.95, init="kmeans", dead_code_threshold=1.0, commitment_weight=COMMITMENT,
            **options,
        )  # fmt: skip

    return make


def _residual(dim: int, codebook_size: int) -> nn.Module:
    return ResidualQuantize([_vq()(dim, max(2, round(codebook_size ** (1 / STAGES)))) for _ in range(STAGES)])


def _fsq(dim: int, codebook_size: int) -> nn.Module:
    levels = max(2, round(codebook_size ** (1 / dim)))
    return FSQ([levels] * dim, symmetric=levels == 2)


# The codebooks of "vq", "rotation", "noise" and "residual" are moving averages; a residual one has words of two codes,
# about as many as the others have codes.
BOTTLENECKS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda dim, _: NoBottleneck(),
    "gaussian": lambda dim, _: GaussianBottleneck(dim, 1e-2),
    "vq": _vq(),
    "gradient": _vq(update="gradient"),
    "rotation": _vq(gradient="rotation"),
    "noise": _vq(gradient="noise"),
    "residual": _residual,
    "simvq": lambda dim, codebook_size: SimVQ(dim, codebook_size, commitment_weight=COMMITMENT),
    "fsq": _fsq,
}
