"""``SimVQ`` of vector-quantize-pytorch over the fused pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamkernels.compat.base import Compat
from lamkernels.compat.vector_quantize_pytorch._upstream import missing_attributes
from lamkernels.eager import routed
from lamkernels.functional import lookup, vector_quantize
from lamkernels.nn.indices import module_indices


def _identity(codes: Tensor) -> Tensor:
    return codes


class SimVQ(Compat):
    """VQP's ``SimVQ``: codes that a transform makes of a frozen codebook. ``quantized, indices, loss = sim_vq(x)``.

    loss = commitment_weight · (mean((sg x − q)²) + input_to_quantize_commit_loss_weight · mean((x − sg q)²)), in
    evaluation mode too. Every option is fused. A row that is not finite is quantised to NaN and has index 0.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("SimVQ",)

    frozen_codebook: Tensor
    code_transform: nn.Module
    channel_first: bool
    rotation_trick: bool
    input_to_quantize_commit_loss_weight: float
    commitment_weight: float

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = _identity,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size, self.channel_first = codebook_size, channel_first
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        frozen = init_fn(torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5)
        self.code_transform = (
            nn.Linear(frozen_dim, dim, bias=False) if codebook_transform is None else codebook_transform
        )
        self.register_buffer("frozen_codebook", frozen)
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D), differentiable in the transform."""
        codes: Tensor = self.code_transform(self.frozen_codebook)
        return codes

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes (B, ..., D) of indices (B, ...), or (B, D, ...) with channels first.

        They are rows of the whole transformed codebook, as the forward's; upstream 1.32.0 transforms the chosen rows
        alone, which is another codebook where the transform mixes rows, such as a batch norm.
        """
        codes = lookup(indices, self.codebook)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises x (B, ..., D), or (B, D, ...) with channels first."""
        rows = x.movedim(1, -1) if self.channel_first else x
        codes = self.codebook
        if codes.dtype != rows.dtype:  # one of them comes out of autocast
            codes = codes.float()
        out = vector_quantize(rows, codes, gradient="rotation" if self.rotation_trick else "ste")
        loss = out.codebook_loss + self.input_to_quantize_commit_loss_weight * out.commitment_loss
        quantized = out.quantized.movedim(-1, 1) if self.channel_first else out.quantized
        return routed(quantized, x), module_indices(out.indices, None), loss * self.commitment_weight

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Another version of VQP."""
        names = ("frozen_codebook", "code_transform", "channel_first", "rotation_trick", "commitment_weight")
        return missing_attributes(module, (*names, "input_to_quantize_commit_loss_weight"))

    def probe(self) -> tuple[Any, ...]:
        """Rows in the layout that the module takes."""
        with torch.no_grad():
            codes = self.codebook
        rows = torch.randn(2, 6, codes.shape[-1], device=codes.device, dtype=codes.dtype)
        return (rows.movedim(-1, 1) if self.channel_first else rows,)
