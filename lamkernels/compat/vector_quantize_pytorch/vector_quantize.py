"""``VectorQuantize`` of vector-quantize-pytorch over the fused pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lamkernels.compat.vector_quantize_pytorch import _codebook as state
from lamkernels.compat.vector_quantize_pytorch import _layout as layout
from lamkernels.compat.vector_quantize_pytorch._codebook import Codebook
from lamkernels.compat.vector_quantize_pytorch._options import (
    ATTRIBUTES,
    check_vector_quantize,
    unfused_attribute,
    unfused_options,
)
from lamkernels.compat.vector_quantize_pytorch._upstream import Delegating, missing_attributes
from lamkernels.functional import VQOutput, code_statistics, lookup, vector_quantize
from lamkernels.nn.indices import module_indices


class LossBreakdown(NamedTuple):
    """The terms of the loss, unweighted; () each."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(Delegating):
    """VQP's ``VectorQuantize``, its work done by one call of :func:`lamkernels.vector_quantize` on its own buffers.

    ``quantize, indices, loss = vq(x)`` with VQP's meaning of every argument. Against VQP: no N×K matrix is made and,
    but for k-means and for dead codes across processes, nothing waits for a GPU; the straight-through and rotated
    outputs are the codes themselves, not the codes to rounding; a row that is not finite is quantised to NaN, has index
    0 and is in no loss and no average; with a mask, the commitment loss works with projections and heads too.

    The outer module does everything on the buffers of ``_codebook``, which may be VQP's own inner module.

    Raises:
        AssertionError: options that VQP refuses together.
        ImportError: an option without a fused form, where VQP is not installed.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("VectorQuantize",)
    upstream_module: ClassVar[str] = "vector_quantize_pytorch"

    _codebook: Codebook
    zero: Tensor
    dim: int
    heads: int
    separate_codebook_per_head: bool
    project_in: nn.Module
    project_out: nn.Module
    has_commitment_loss: bool
    commitment_weight: float
    learnable_codebook: bool
    rotation_trick: bool
    route_gradients_to_input: bool
    codebook_size: int
    accept_image_fmap: bool
    accept_3d_fmap: bool
    channel_last: bool
    return_zeros_for_masked_padding: bool
    freeze_codebook: bool
    use_cosine_sim: bool

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        unfused = unfused_options(options)
        if unfused:
            self._take_over(options, unfused)
            return
        ema_update = True if ema_update is None else ema_update
        learnable_codebook = bool(learnable_codebook)
        rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        check_vector_quantize(use_cosine_sim, learnable_codebook, ema_update)
        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner_dim = codebook_dim * heads

        self.dim, self.heads, self.separate_codebook_per_head = dim, heads, separate_codebook_per_head
        self.has_projections = inner_dim != dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner_dim)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner_dim))
            self.project_out = nn.Linear(inner_dim, dim)
        self.eps, self.commitment_weight = eps, commitment_weight
        self.has_commitment_loss, self.commitment_use_cross_entropy_loss = commitment_weight > 0, False
        self.learnable_codebook, self.use_cosine_sim = learnable_codebook, use_cosine_sim
        self.has_codebook_orthogonal_loss, self.orthogonal_reg_weight = False, 0.0
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.has_codebook_diversity_loss, self.codebook_diversity_loss_weight = False, 0.0
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.rotation_trick, self.sync_update_v = rotation_trick, 0.0
        self.directional_reparam, self.directional_reparam_variance = False, directional_reparam_variance
        self.route_gradients_to_input = route_gradients_to_input
        self.in_place_codebook_optimizer: torch.optim.Optimizer | None = None
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.codebook_size = codebook_size
        self.accept_image_fmap, self.accept_3d_fmap, self.channel_last = accept_image_fmap, accept_3d_fmap, channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.freeze_codebook = freeze_codebook
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            sync_codebook=sync_codebook,
            learnable_codebook=learnable_codebook,
            sample_codebook_temp=sample_codebook_temp,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
        )
        self._initted_on_host = not kmeans_init
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow their moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D), or (H, K, D) with a codebook per head."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed.squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes[None])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes (..., D) of indices (...,), with a codebook per head (..., H·D) of (..., H); channels lie as in x."""
        codebook = self.codebook
        if codebook.ndim == 2:
            codes = codebook[indices]
        else:
            heads = torch.arange(codebook.shape[0], device=indices.device)
            codes = codebook[heads, indices].flatten(-2)
        channels_last = self.channel_last and not self.accept_image_fmap and not self.accept_3d_fmap
        return codes if channels_last else codes.movedim(-1, 1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The projected codes of indices. As upstream, the projection expects channels last."""
        projected: Tensor = self.project_out(self.get_codes_from_indices(indices))
        return projected

    def update_in_place_optimizer(self) -> None:
        """A step of ``in_place_codebook_optimizer``, where the module was given one."""
        if self.in_place_codebook_optimizer is not None:
            self._run_upstream("in_place_codebook_optimizer", "update_in_place_optimizer")

    def maybe_split_heads_from_input(self, x: Tensor) -> Tensor:
        """x (B, N, H·D) as (H, B, N, D), or (1, B·H, N, D) where the heads share a codebook."""
        if self.heads == 1:
            return x
        x = layout.split_heads(self, x)
        return x if self.separate_codebook_per_head else x.transpose(1, 2).flatten(0, 1)[None]

    def expire_codes_(self, x: Tensor) -> None:
        """Replaces dead codes by rows of x (B, N, D), in training mode.

        As upstream, with one head by rows of x[0] alone: it takes the first axis for that of the codebooks.
        """
        codebook = self._codebook
        if codebook.training:
            rows = self._normalised(layout.split_heads(self, x.detach() if self.heads > 1 else x[:1].detach()))
            state.replace_dead_codes(codebook, layout.rows_in_order(self, rows), None)

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """One step of the averages by rows x and the codes that they chose, with ``ema_update=False`` before."""
        with torch.no_grad():
            rows = self._kernel_rows(self.project_in(layout.channels_last(self, x, mask)), x.dtype)
            rows = self._normalised(layout.split_heads(self, rows))
        indices = indices.clamp(min=0)
        if mask is not None:
            indices = indices.masked_fill(~(mask if self.heads == 1 else mask[..., None]), -1)
        per_head = self.heads > 1 and self.separate_codebook_per_head
        parts = [(rows, indices)]
        if per_head:
            parts = list(zip(rows, indices.unbind(-1), strict=True))
        statistics = [code_statistics(part, chosen, self.codebook_size) for part, chosen in parts]
        counts, sums = (torch.stack(part) for part in zip(*statistics, strict=True))
        state.update(self._codebook, counts, sums, lambda: layout.rows_to_draw(self, rows, mask))

    update_ema_indices = update_indices

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[..., Tensor] | None = None,
        ema_update_weight: state.Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Any:
        """(quantize, indices, loss), and a :class:`LossBreakdown` where asked for.

        ``indices`` (a cross entropy over all codes), ``topk`` and ``codebook_transform_fn`` run in upstream's code.
        """
        unfused = unfused_attribute(self) or _unfused_argument(indices, topk, codebook_transform_fn)
        if unfused is not None:
            arguments = {name: value for name, value in locals().items() if name not in ("self", "unfused", "x")}
            return self._run_upstream(unfused, "forward", x, **arguments)
        if lens is not None:
            if mask is not None:
                raise AssertionError("mask and lens are both given; one of them must be None")
            mask = torch.arange(x.shape[1 if self.channel_last else -1], device=lens.device) < lens[:, None]
        codebook, dtype, training = self._codebook, x.dtype, self.training
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        routed = training and x.requires_grad and self.route_gradients_to_input
        rows = original = layout.channels_last(self, x, mask)
        if self.has_projections:
            rows = self.project_in(rows)
        rows = self._normalised(layout.split_heads(self, self._kernel_rows(rows, dtype)))
        if not self._initialised():
            state.initialise(codebook, *layout.rows_to_draw(self, rows, mask))

        codes = codebook.embed if codebook.learnable_codebook else codebook.embed.detach()
        if codes.shape[0] == 1:
            codes = codes.squeeze(0)
        codes = codes.float()
        row_mask = None if mask is None else layout.mask_of_heads(self, mask, rows.shape[:-1])
        out = vector_quantize(
            rows,
            codes if self.learnable_codebook and training and not frozen else codes.detach(),
            gradient=("rotation" if self.rotation_trick else "ste") if routed else "none",
            mask=row_mask,
            metric="dot" if self.use_cosine_sim else "l2",
        )
        quantized = out.quantized
        if not routed and codes.requires_grad:  # the output itself teaches the codes
            quantized = lookup(out.indices.clamp(min=0), codes).to(quantized.dtype)
        commitment = self.zero
        if training:
            if self.has_commitment_loss:
                commitment = self._commitment(out, original, mask, frozen)
            loss = commitment if self.commitment_weight == 1 else commitment * self.commitment_weight
            if not loss.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                loss = loss.detach().clone().requires_grad_()  # as upstream: backward() works
            if not frozen:
                heads = codebook.embed.shape[0]
                state.update(
                    codebook,
                    out.counts.view(heads, -1),
                    out.sums.view(heads, -1, out.sums.shape[-1]),
                    lambda: layout.rows_to_draw(self, rows.detach(), mask),
                    weight=ema_update_weight,
                    accumulate=accum_ema_update,
                    ema_update=ema_update,
                )
        else:
            loss = self.zero
        quantized, chosen = layout.merge(self, quantized, module_indices(out.indices, row_mask), original, mask)
        if not return_loss_breakdown:
            return quantized, chosen, loss
        return quantized, chosen, loss, LossBreakdown(commitment, self.zero, self.zero, self.zero)

    def _kernel_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """fp64 is rounded to fp32, as upstream, and autocast does not round the codes."""
        return rows.float() if rows.dtype == torch.float64 or rows.dtype != dtype else rows

    def _normalised(self, rows: Tensor) -> Tensor:
        return state.unit(rows) if self.use_cosine_sim else rows

    def _initialised(self) -> bool:
        """Whether the codebook was. A GPU is asked until it was, once more after a state was loaded."""
        flag = self._codebook.initted
        known: bool = self.__dict__.get("_initted_on_host", False)
        if known and (not flag.is_cpu or torch.compiler.is_compiling()):
            return True
        ready = bool(flag)
        if ready and not known:
            self._initted_on_host = True
        return ready

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("_initted_on_host", None)
        super()._load_from_state_dict(*args, **kwargs)

    def _commitment(self, out: VQOutput, original: Tensor, mask: Tensor | None, frozen: bool) -> Tensor:
        loss = out.commitment_loss
        if mask is not None and self.use_cosine_sim and self.heads == 1 and not self.has_projections:
            # upstream compares with the input before its normalisation here, and only here
            error = (out.quantized.detach() - original).square().masked_fill(~mask[..., None], 0.0)
            loss = error.sum() / (mask.sum().clamp(min=1) * error.shape[-1])
        elif self.learnable_codebook and not frozen:
            loss = loss + (out.codebook_loss - out.codebook_loss.detach())
        return loss.to(torch.promote_types(torch.float32, original.dtype))

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Another version of VQP, or an option without a fused form."""
        reason = missing_attributes(module, ATTRIBUTES)
        if reason is not None:
            return reason
        embed = getattr(module._codebook, "embed", None)
        if not isinstance(embed, Tensor) or embed.ndim != 3:
            return "its _codebook.embed is not (heads, codes, dim)"
        unfused = unfused_attribute(module)
        return None if unfused is None else f"{unfused} has no fused form"

    def probe(self) -> tuple[Any, ...]:
        """Rows in the layout that the module takes."""
        codebook = self._codebook.embed
        parameter = next(self.parameters(), codebook)
        shape = (2, 6, self.dim) if self.channel_last else (2, self.dim, 6)
        if self.accept_image_fmap or self.accept_3d_fmap:
            shape = (2, self.dim, *((2, 3) if self.accept_image_fmap else (2, 1, 3)))
        return (torch.randn(shape, device=codebook.device, dtype=parameter.dtype),)


def _unfused_argument(indices: Any, topk: Any, transform: Any) -> str | None:
    if indices is not None:
        return "indices=..., a cross entropy over all codes"
    if topk is not None:
        return "topk"
    return None if transform is None else "codebook_transform_fn"
