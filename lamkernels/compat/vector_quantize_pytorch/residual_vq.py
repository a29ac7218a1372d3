"""``ResidualVQ`` and ``GroupedResidualVQ`` of vector-quantize-pytorch over the fused ``VectorQuantize``."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.compat.vector_quantize_pytorch import _dropout
from lamkernels.compat.vector_quantize_pytorch._upstream import Delegating, missing_attributes
from lamkernels.compat.vector_quantize_pytorch.vector_quantize import VectorQuantize

_ATTRIBUTES = (
    "project_in", "project_out", "has_projections", "accept_image_fmap", "return_zeros_for_masked_padding",
    "implicit_neural_codebook", "diveq", "num_quantizers", "codebook_sizes", "uniform_codebook_size", "layers",
    "quantize_dropout", "quantize_dropout_cutoff_index", "quantize_dropout_multiple_of", "vq_is_ema_updating",
    "quant_grad_frac", "beam_size", "eval_beam_size", "shared_codebook",
)  # fmt: skip


class ResidualVQ(Delegating):
    """VQP's ``ResidualVQ``: each quantiser codes what the ones before left over.

    ``quantized, indices (..., Q), losses (Q,) = rvq(x)``, the layers being the fused :class:`VectorQuantize`. Beam
    search, ``implicit_neural_codebook``, ``diveq`` and ``indices`` (a cross entropy) run in upstream's code. With
    ``quantize_dropout`` the host asks the device for one number a step, as upstream does.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("ResidualVQ",)
    upstream_module: ClassVar[str] = "residual_vq"

    layers: Any  # a ModuleList of VectorQuantize
    project_in: nn.Module
    project_out: nn.Module

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] = {},  # noqa: B006  (upstream's default; never written to)
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: list[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__", "vq_kwargs")} | vq_kwargs
        super().__init__()
        unfused = [name for name in ("implicit_neural_codebook", "diveq") if options[name]]
        if unfused:
            self._take_over(options, unfused)
            return
        if max(beam_size or 1, eval_beam_size or 1) > 1:
            self._upstream_class(f"beam_size={beam_size}")  # the search itself runs there
        if heads != 1:
            raise AssertionError("residual vq is not compatible with multi-headed codes")
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise AssertionError("num_quantizers is None; it may be that for a tuple of codebook sizes only")
        if eval_beam_size is not None and beam_size is None:
            raise AssertionError("eval_beam_size needs beam_size")
        if quantize_dropout_cutoff_index < 0:
            raise AssertionError(f"quantize_dropout_cutoff_index is {quantize_dropout_cutoff_index}; it must be ≥ 0")
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * (num_quantizers or 0)
        num_quantizers = len(sizes) if num_quantizers is None else num_quantizers
        weights = beam_score_quantizer_weights or [1.0] * num_quantizers
        if len(sizes) != num_quantizers or len(weights) != num_quantizers:
            raise AssertionError(f"{len(sizes)} codebook sizes, {len(weights)} weights, {num_quantizers} quantizers")

        self.codebook_dim = inner = dim if codebook_dim is None else codebook_dim
        self.has_projections = inner != dim
        self.project_in = nn.Linear(dim, inner) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap = accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.implicit_neural_codebook, self.diveq = False, False
        self.num_quantizers, self.codebook_sizes = num_quantizers, sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        vq_kwargs = vq_kwargs | {"return_zeros_for_masked_padding": return_zeros_for_masked_padding}
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
        self.layers = nn.ModuleList(
            VectorQuantize(
                dim=inner, codebook_size=size, codebook_dim=inner, accept_image_fmap=accept_image_fmap, **vq_kwargs
            )
            for size in sizes
        )
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.vq_is_ema_updating = self.layers[0].ema_update
        self.quant_grad_frac = quant_grad_frac
        self.beam_size, self.eval_beam_size = beam_size, beam_size if eval_beam_size is None else eval_beam_size
        self.register_buffer("beam_score_weights", torch.tensor(weights), persistent=False)
        self.mlps = (None,) * (num_quantizers - 1)
        self.shared_codebook = shared_codebook
        if shared_codebook:
            if not self.uniform_codebook_size:
                raise AssertionError(f"a shared codebook has one size; codebook_size is {codebook_size}")
            for layer in self.layers[1:]:
                layer._codebook = self.layers[0]._codebook

    @property
    def codebook_size(self) -> int:
        """K of the first quantiser."""
        size: int = self.layers[0].codebook_size
        return size

    @property
    def codebooks(self) -> Any:
        """The codes (Q, K, D); a tuple of (K, D) where the sizes differ."""
        codes = tuple(layer._codebook.embed.squeeze(0) for layer in self.layers)
        return torch.stack(codes) if self.uniform_codebook_size else codes

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes (Q, ..., D) of indices (..., Q), zero where the index is −1; of fewer quantisers with dropout only."""
        if self.implicit_neural_codebook:
            codes: Tensor = self._run_upstream("implicit_neural_codebook", "get_codes_from_indices", indices)
            return codes
        indices = _dropout.padded(self, indices)
        return torch.stack(
            [
                F.embedding(chosen.clamp(min=0), layer._codebook.embed[0]).masked_fill((chosen == -1)[..., None], 0.0)
                for layer, chosen in zip(self.layers, indices.unbind(-1), strict=True)
            ]
        )

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The projected sum (..., D) of the codes of indices (..., Q)."""
        projected: Tensor = self.project_out(self.get_codes_from_indices(indices).sum(0))
        return projected

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> Any:
        """(quantized, indices (..., Q), losses (Q,)), and all codes (Q, ..., D) where asked for."""
        unfused = self._unfused(indices, beam_size)
        if unfused is not None:
            arguments = {name: value for name, value in locals().items() if name not in ("self", "unfused", "x")}
            return self._run_upstream(unfused, "forward", x, **arguments)
        residual = self.project_in(x)
        quantized: Any = 0.0
        last = self.num_quantizers - 1
        if self.training and self.quantize_dropout:
            last = _dropout.last_quantizer(self, x.device, rand_quantize_dropout_fixed_seed)
        residuals, chosen, losses = [], [], []
        for layer in list(self.layers)[: last + 1]:
            if self.shared_codebook:
                residuals.append(residual.detach())
            codes, layer_indices, loss = layer(
                residual, mask=mask, sample_codebook_temp=sample_codebook_temp, freeze_codebook=freeze_codebook
            )
            residual = residual - _fraction_of_gradient(codes, self.quant_grad_frac)
            quantized = quantized + codes
            chosen.append(layer_indices)
            losses.append(loss)
        dropped = self.num_quantizers - len(chosen)
        all_indices, all_losses = torch.stack(chosen, -1), torch.stack(losses, -1)
        if dropped:
            all_indices, all_losses = F.pad(all_indices, (0, dropped), value=-1), F.pad(all_losses, (0, dropped))
        if self.training and self.shared_codebook:
            self._update_shared(residuals)
        quantized = self.project_out(quantized)
        if mask is not None:
            padding = torch.zeros_like(quantized) if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask[..., None], quantized, padding)
        if not return_all_codes:
            return quantized, all_indices, all_losses
        return quantized, all_indices, all_losses, self.get_codes_from_indices(all_indices)

    def _unfused(self, indices: Any, beam_size: int | None) -> str | None:
        if self.implicit_neural_codebook or self.diveq:
            return "implicit_neural_codebook" if self.implicit_neural_codebook else "diveq"
        if indices is not None:
            return "indices=..., a cross entropy over all codes"
        beam = beam_size or (self.beam_size if self.training else self.eval_beam_size)
        return f"beam_size={beam}" if beam is not None and beam > 1 else None

    def _update_shared(self, residuals: list[Tensor]) -> None:
        shared = self.layers[0]
        if self.vq_is_ema_updating:
            shared._codebook.update_ema()
            shared.update_in_place_optimizer()
        if shared._codebook.has_dead_code_replacement:
            if self.accept_image_fmap:  # upstream takes the last axis of the maps for the channels
                residuals = [part.movedim(1, -1) for part in residuals]
            rows = torch.stack(residuals, -2)
            shared.expire_codes_(rows.flatten(0, 1) if rows.ndim == 3 else rows.flatten(1, -2))

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Another version of VQP, or an option without a fused form."""
        reason = missing_attributes(module, _ATTRIBUTES)
        if reason is not None:
            return reason
        unfused = [name for name in ("implicit_neural_codebook", "diveq") if getattr(module, name)]
        own = module.__dict__
        if max(own["beam_size"] or 1, own["eval_beam_size"] or 1) > 1:
            unfused.append("beam_size")
        return f"{', '.join(unfused)} has no fused form" if unfused else None

    def probe(self) -> tuple[Any, ...]:
        """Rows in the layout that the module takes."""
        embed = self.layers[0]._codebook.embed
        parameter = next(self.parameters(), embed)
        dim = self.project_in.in_features if isinstance(self.project_in, nn.Linear) else embed.shape[-1]
        shape = (2, dim, 2, 3) if self.accept_image_fmap else (2, 6, dim)
        return (torch.randn(shape, device=embed.device, dtype=parameter.dtype),)


class GroupedResidualVQ(Delegating):
    """VQP's ``GroupedResidualVQ``: a :class:`ResidualVQ` for each group of channels.

    ``quantized, indices (G, ..., Q), losses (G, Q) = rvq(x)``.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("GroupedResidualVQ",)
    upstream_module: ClassVar[str] = "residual_vq"

    rvqs: Any  # a ModuleList of ResidualVQ
    dim: int
    groups: int
    accept_image_fmap: bool

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        if dim % groups:
            raise AssertionError(f"dim is {dim}; it must be a multiple of groups, {groups}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs) for _ in range(groups)
        )

    @property
    def codebooks(self) -> Tensor:
        """The codes (G, Q, K, D)."""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    @property
    def split_dim(self) -> int:
        """The axis of the channels."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes (G, Q, ..., D) of indices (G, ..., Q)."""
        return torch.stack([rvq.get_codes_from_indices(part) for rvq, part in zip(self.rvqs, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The vectors of indices (G, ..., Q)."""
        parts = [rvq.get_output_from_indices(part) for rvq, part in zip(self.rvqs, indices, strict=True)]
        return torch.cat(parts, self.split_dim)

    def forward(
        self,
        x: Tensor,
        indices: Any = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """(quantized, indices, losses), the codes of each group if asked for; (quantized, loss) with ``indices``."""
        if x.shape[self.split_dim] != self.dim:
            raise AssertionError(f"x has shape {tuple(x.shape)}; its axis {self.split_dim} must be {self.dim}")
        given = [] if indices is None else list(indices)
        if len(given) not in (0, self.groups):
            raise AssertionError(f"indices has {len(given)} entries; there are {self.groups} groups")
        dropout = any(rvq.quantize_dropout for rvq in self.rvqs)
        seed = _dropout.seed(x.device, dropout) if self.training else None
        parts = [
            rvq(
                part,
                indices=given[i] if given else None,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                mask=mask,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for i, (rvq, part) in enumerate(zip(self.rvqs, x.chunk(self.groups, self.split_dim), strict=True))
        ]
        quantized, *others = zip(*parts, strict=True)
        joined = torch.cat(quantized, self.split_dim)
        if given:
            return joined, sum(others[0])
        chosen, losses, *codes = others
        return (joined, torch.stack(chosen), torch.stack(losses), *codes)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Another version of VQP, or a group that has no fused form."""
        reason = missing_attributes(module, ("rvqs", "dim", "groups", "accept_image_fmap"))
        if reason is None:
            reasons = (ResidualVQ.refusal(rvq) for rvq in cast(Any, module).rvqs)
            reason = next((r for r in reasons if r is not None), None)
        return reason

    def probe(self) -> tuple[Any, ...]:
        """Rows in the layout that the module takes."""
        embed = self.rvqs[0].layers[0]._codebook.embed
        parameter = next(self.parameters(), embed)
        shape = (2, self.dim, 2, 3) if self.accept_image_fmap else (2, 6, self.dim)
        return (torch.randn(shape, device=embed.device, dtype=parameter.dtype),)


def _fraction_of_gradient(x: Tensor, fraction: float) -> Tensor:
    detached = x.detach()
    return detached if fraction <= 0 else fraction * x + (1.0 - fraction) * detached
