"""``ResidualFSQ`` of vector-quantize-pytorch over :class:`FSQ`."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.compat.base import Compat
from lamkernels.compat.vector_quantize_pytorch import _dropout
from lamkernels.compat.vector_quantize_pytorch._upstream import missing_attributes
from lamkernels.compat.vector_quantize_pytorch.fsq import FSQ


class ResidualFSQ(Compat):
    """VQP's ``ResidualFSQ``: each FSQ codes what the ones before left over, on a finer grid.

    ``quantized, indices (..., Q) = rfsq(x)``, and all codes (Q, ..., D) where asked for.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("ResidualFSQ",)

    scales: Tensor
    soft_clamp_input_value: Tensor | None
    layers: Any  # a ModuleList of FSQ
    project_in: nn.Module
    project_out: nn.Module
    num_quantizers: int
    is_channel_first: bool
    quantize_dropout: bool

    def __init__(
        self,
        *,
        levels: list[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | list[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        counts = torch.tensor(levels)
        if not (counts > 1).all():
            raise AssertionError(f"levels are {levels}; each must be at least 2")
        if quantize_dropout_cutoff_index < 0:
            raise AssertionError(f"quantize_dropout_cutoff_index is {quantize_dropout_cutoff_index}; it must be ≥ 0")
        if bound_hard_clamp and soft_clamp_input_value is not None:
            raise AssertionError("soft_clamp_input_value needs bound_hard_clamp=False")
        inner = len(levels)
        dim = inner if dim is None else dim
        self.has_projections = inner != dim
        self.project_in = nn.Linear(dim, inner) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if self.has_projections else nn.Identity()
        self.is_channel_first, self.num_quantizers, self.levels = is_channel_first, num_quantizers, levels
        self.layers = nn.ModuleList(
            FSQ(levels, dim=inner, preserve_symmetry=True, bound_hard_clamp=bound_hard_clamp, **kwargs)
            for _ in range(num_quantizers)
        )
        if any(layer.has_projections for layer in self.layers):
            raise AssertionError("the layers have projections; num_codebooks must be 1")
        self.codebook_size = self.layers[0].codebook_size
        scales = torch.stack([counts.float() ** -index for index in range(num_quantizers)])
        self.register_buffer("scales", scales, persistent=False)
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        clamp: Any = 1 + 1 / (counts - 1) if bound_hard_clamp else soft_clamp_input_value
        if isinstance(clamp, (list, float)):
            clamp = torch.tensor(clamp)
        self.register_buffer("soft_clamp_input_value", clamp, persistent=False)

    @property
    def codebooks(self) -> Tensor:
        """The codes (Q, K, D), without their scales."""
        return torch.stack([layer.implicit_codebook for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Scaled codes (Q, ..., D) of indices (..., Q), zero where the index is −1; fewer with the dropout only."""
        indices = _dropout.padded(self, indices)
        codes = [
            F.embedding(chosen.clamp(min=0), layer.implicit_codebook).masked_fill((chosen == -1)[..., None], 0.0)
            * scale
            for layer, scale, chosen in zip(self.layers, self.scales, indices.unbind(-1), strict=True)
        ]
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The projected sum (..., D) of the codes of indices (..., Q)."""
        projected: Tensor = self.project_out(self.get_codes_from_indices(indices).sum(0))
        return projected

    def forward(
        self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> Any:
        """(quantized, indices (..., Q)), and all codes (Q, ..., D) where asked for."""
        space = x.shape[2:]
        if self.is_channel_first:
            # three axes, because the layers take four for an image; as upstream's in memory, the order of its noise
            x = x.reshape(*x.shape[:2], -1).transpose(1, 2).contiguous()
        residual = self.project_in(x)
        clamp = self.soft_clamp_input_value
        if clamp is not None:
            residual = (residual / clamp).tanh() * clamp
        last = self.num_quantizers - 1
        if self.training and self.quantize_dropout and torch.is_grad_enabled():
            last = _dropout.last_quantizer(self, x.device, rand_quantize_dropout_fixed_seed)
        quantized: Any = 0.0
        chosen = []
        with torch.autocast(x.device.type, enabled=False):
            for layer, scale in list(zip(self.layers, self.scales, strict=True))[: last + 1]:
                codes, indices = layer(residual / scale)
                codes = codes * scale
                residual = residual - codes.detach()
                quantized = quantized + codes
                chosen.append(indices)
        all_indices = torch.stack(chosen, -1)
        if len(chosen) < self.num_quantizers:
            all_indices = F.pad(all_indices.long(), (0, self.num_quantizers - len(chosen)), value=-1)
        quantized = self.project_out(quantized)
        if self.is_channel_first:
            quantized, all_indices = (
                t.transpose(1, 2).reshape(t.shape[0], -1, *space) for t in (quantized, all_indices)
            )
        if not return_all_codes:
            return quantized, all_indices
        return quantized, all_indices, self.get_codes_from_indices(all_indices)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Another version of VQP, or noise dropout in a layer."""
        names = ("layers", "scales", "soft_clamp_input_value", "project_in", "project_out", "is_channel_first")
        dropout = (
            "num_quantizers",
            "quantize_dropout",
            "quantize_dropout_cutoff_index",
            "quantize_dropout_multiple_of",
        )
        reason = missing_attributes(module, names + dropout)
        if reason is None:
            reasons = (FSQ.refusal(layer) for layer in cast(Any, module).layers)
            reason = next((r for r in reasons if r is not None), None)
        return reason

    def probe(self) -> tuple[Any, ...]:
        """Rows in the layout that the module takes."""
        dim = self.project_in.in_features if isinstance(self.project_in, nn.Linear) else self.scales.shape[-1]
        parameter = next(self.parameters(), self.scales)
        shape = (2, dim, 6) if self.is_channel_first else (2, 6, dim)
        return (torch.randn(shape, device=self.scales.device, dtype=parameter.dtype),)
