"""``LFQ`` of vector-quantize-pytorch over the fused lookup-free quantisation."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.compat.vector_quantize_pytorch import _processes
from lamkernels.compat.vector_quantize_pytorch._upstream import Delegating, missing_attributes
from lamkernels.lookup_free import LFQOutput, lookup_free_codes, lookup_free_quantize

_ATTRIBUTES = (
    "project_in", "project_out", "dim", "codebook_dim", "num_codebooks", "keep_num_codebooks_dim", "channel_first",
    "activation", "spherical", "orthogonal_rotation", "frac_per_sample_entropy", "diversity_gamma", "codebook_scale",
    "entropy_loss_weight", "commitment_loss_weight", "soft_clamp_input_value", "entropy_loss_offset", "mask", "zero",
    "experimental_softplus_entropy_loss", "force_quantization_f32", "codebook",
)  # fmt: skip

_NOT_UPSTREAMS = ("self", "__class__", "factorized_entropy")


class Return(NamedTuple):
    """quantized, indices int64 and entropy_aux_loss ()."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """The terms of the loss, unweighted; () each."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class LFQ(Delegating):
    """VQP's ``LFQ``: ``quantized, indices, entropy_aux_loss = lfq(x)``; signs, indices and commitment are one pass.

    Upstream clamps the probability in the logarithm of its entropies at 1e-5, which takes the N × 2^D probabilities of
    every code; so does this class, for the same losses. ``factorized_entropy=True``, ours, takes the exact entropies of
    :func:`lamkernels.lookup_free_quantize` instead, without that matrix: they differ from upstream's by the mass below
    the clamp, which grows with D.

    Across processes the mean distribution is that of all rows; upstream 1.32.0 divides by their number without summing.
    ``factorized_entropy`` takes that of this process. ``cosine_sim_project_in`` uses upstream's layer. A row that is
    not finite is quantised to NaN and has index 0.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("LFQ",)
    upstream_module: ClassVar[str] = "lookup_free_quantization"

    mask: Tensor
    zero: Tensor
    codebook: Tensor
    orthogonal_rot: Tensor
    project_in: nn.Module
    project_out: nn.Module
    activation: nn.Module
    dim: int
    codebook_dim: int
    num_codebooks: int
    keep_num_codebooks_dim: bool
    channel_first: bool | None
    codebook_scale: float
    spherical: bool
    orthogonal_rotation: bool
    frac_per_sample_entropy: float
    diversity_gamma: float
    entropy_loss_weight: float
    commitment_loss_weight: float
    soft_clamp_input_value: float | None
    entropy_loss_offset: float
    experimental_softplus_entropy_loss: bool
    force_quantization_f32: bool

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
        factorized_entropy: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in _NOT_UPSTREAMS}
        super().__init__()
        activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        if cosine_sim_project_in:
            self._take_over(options | {"straight_through_activation": activation}, ["cosine_sim_project_in"])
            del self.__dict__["maybe_l2norm"]  # a lambda, which does not pickle
            self.factorized_entropy = factorized_entropy
            return
        if codebook_size is None and dim is None:
            raise AssertionError("dim and codebook_size are None; one of them must be given")
        if codebook_size is not None and not math.log2(codebook_size).is_integer():
            raise AssertionError(f"codebook_size is {codebook_size}; it must be a power of 2")
        codebook_size = 2 ** (dim or 0) if codebook_size is None else codebook_size
        bits = int(math.log2(codebook_size))
        inner = bits * num_codebooks
        dim = inner if dim is None else dim
        several = num_codebooks > 1
        keep = several if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        if several and not keep:
            raise AssertionError("keep_num_codebooks_dim is False; with several codebooks it must be True")
        if not 0 < frac_per_sample_entropy <= 1:
            raise AssertionError(f"frac_per_sample_entropy is {frac_per_sample_entropy}; it must be in (0, 1]")
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise AssertionError(f"soft_clamp_input_value is {soft_clamp_input_value}; it is less than codebook_scale")
        self.has_projections = dim != inner if has_projections is None else has_projections
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner, bias=projection_has_bias)
            self.project_out = nn.Linear(inner, dim, bias=projection_has_bias)
        self.codebook_size, self.dim, self.codebook_dim, self.num_codebooks = codebook_size, dim, bits, num_codebooks
        self.keep_num_codebooks_dim, self.channel_first = keep, channel_first
        self.activation, self.spherical, self.orthogonal_rotation = activation, spherical, orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(bits, bits)))
        self.frac_per_sample_entropy, self.diversity_gamma = frac_per_sample_entropy, diversity_gamma
        self.entropy_loss_weight, self.commitment_loss_weight = entropy_loss_weight, commitment_loss_weight
        self.codebook_scale, self.soft_clamp_input_value = codebook_scale, soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self.force_quantization_f32 = force_quantization_f32
        codes = lookup_free_codes(torch.arange(codebook_size), bits, scale=codebook_scale)
        self.register_buffer("codebook", codes, persistent=False)
        self.factorized_entropy = factorized_entropy

    def maybe_l2norm(self, t: Tensor) -> Tensor:
        """t, of the length ``codebook_scale`` with ``spherical``."""
        return F.normalize(t, dim=-1) * self.codebook_scale if self.spherical else t

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """Codes of bits 0 and 1, not normalised."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return self.codebook.dtype

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """The vectors of indices, in the layout of the forward's output."""
        moved = self._channels_first(indices.ndim >= 3 + int(self.keep_num_codebooks_dim))
        if not self.keep_num_codebooks_dim:
            indices = indices[..., None]
        codes = lookup_free_codes(indices.long(), self.codebook_dim, scale=self._magnitude(), dtype=self.dtype)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.t()
        codes = codes.flatten(-2)
        out: Tensor = self.project_out(codes) if project_out else codes
        return out.movedim(-1, 1) if moved else out

    def forward(
        self, x: Tensor, inv_temperature: float = 100.0, return_loss_breakdown: bool = False, mask: Tensor | None = None
    ) -> Any:
        """A :class:`Return` for x (B, ..., D), (B, D, ...) with channels first, and a :class:`LossBreakdown` if asked.

        ``mask`` (B,) or (B, N) bool says which rows are in the losses; all rows are quantised. With the latter the
        batch entropy is the sample entropy, as in upstream 1.32.0, but with ``factorized_entropy``.
        """
        moved = self._channels_first(x.ndim >= 4)
        x = x.movedim(1, -1) if moved else x
        if x.shape[-1] != self.dim:
            raise AssertionError(f"x has {x.shape[-1]} channels; it must have {self.dim}")
        x = self.project_in(x)
        if self.soft_clamp_input_value is not None:
            x = (x / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        x = x.reshape(*x.shape[:-1], self.num_codebooks, self.codebook_dim)
        if self.orthogonal_rotation:
            x = x @ self.orthogonal_rot
        x = self.maybe_l2norm(x)
        dtype = x.dtype
        if self.force_quantization_f32:
            x = x.float()
        out = self._quantize(x, inv_temperature, None)
        quantized = self._straight_through(x, out.quantized)
        losses = LossBreakdown(self.zero, self.zero, self.zero)
        loss = self.zero
        if self.training:
            losses = self._losses(x, out, inv_temperature, mask)
            loss = losses.per_sample_entropy - self.diversity_gamma * losses.batch_entropy
            if self.experimental_softplus_entropy_loss:
                loss = F.softplus(loss + self.entropy_loss_offset)
        quantized = quantized.to(dtype)
        if self.orthogonal_rotation:
            quantized = quantized @ self.orthogonal_rot.t()
        quantized = self.project_out(quantized.flatten(-2))
        quantized = quantized.movedim(-1, 1) if moved else quantized
        indices = out.indices.clamp(min=0)
        if not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        loss = loss * self.entropy_loss_weight + losses.commitment * self.commitment_loss_weight
        result = Return(quantized, indices, loss)
        return (result, losses) if return_loss_breakdown else result

    def _channels_first(self, image: bool) -> bool:
        return image if self.channel_first is None else self.channel_first

    def _magnitude(self) -> float:
        """Of a code's entries; a spherical code has the length ``codebook_scale``."""
        return self.codebook_scale * (self.codebook_dim**-0.5 if self.spherical else 1.0)

    def _factorized(self) -> bool:
        return bool(self.__dict__.get("factorized_entropy", False))

    def _quantize(self, x: Tensor, inv_temperature: float, mask: Tensor | None) -> LFQOutput:
        return lookup_free_quantize(
            x,
            scale=self._magnitude(),
            inv_temperature=inv_temperature,
            mask=mask,
            codebook_entropy=self.training and self._factorized(),
        )

    def _straight_through(self, x: Tensor, quantized: Tensor) -> Tensor:
        if not self.training:
            return quantized.detach()
        if isinstance(self.activation, nn.Identity):
            return quantized
        active: Tensor = self.activation(x)
        return quantized.detach() + (active - active.detach())

    def _losses(self, x: Tensor, out: LFQOutput, inv_temperature: float, mask: Tensor | None) -> LossBreakdown:
        """The terms for x (B, ..., C, D); the mask is (B,) or (B, N), of the rows in one axis."""
        x = x.reshape(x.shape[0], -1, *x.shape[-2:])
        rows = None
        if mask is not None:
            if mask.shape != x.shape[: mask.ndim] or mask.ndim > 2:
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)}; it must be {x.shape[:1]} or {tuple(x.shape[:2])}"
                )
            rows = mask.reshape(*mask.shape, *(1,) * (3 - mask.ndim)).expand(x.shape[:-1])
            out = self._quantize(x, inv_temperature, rows)
        commitment = out.commitment_loss if self.commitment_loss_weight > 0 else self.zero
        by_token = mask is not None and mask.ndim == 2
        if self.frac_per_sample_entropy < 1:  # of a random part of the rows, drawn as upstream draws it
            x = (
                x.flatten(0, 1)
                if mask is None
                else x[mask].reshape(-1, *(x.shape[2:] if not by_token else (1, x.shape[3])))
            )
            number = max(1, int(x.shape[0] * self.frac_per_sample_entropy))  # upstream 1.32.0 takes none, and is NaN
            x, rows = x[torch.randn(x.shape[0]).argsort(-1) < number], None
            if self._factorized():
                out = lookup_free_quantize(x, scale=self._magnitude(), inv_temperature=inv_temperature)
        if self._factorized():
            assert out.codebook_entropy is not None, "asked for above"
            return LossBreakdown(out.sample_entropy, out.codebook_entropy, commitment)
        return LossBreakdown(*self._clamped_entropies(x, inv_temperature, rows, by_token), commitment)

    def _clamped_entropies(
        self, x: Tensor, inv_temperature: float, mask: Tensor | None, by_token: bool
    ) -> tuple[Tensor, Tensor]:
        """Upstream's entropies of x (..., C, D): of a row's code distribution, and of the mean distribution."""
        codes = self.maybe_l2norm(self.codebook.to(x.dtype))
        probabilities = ((2.0 * inv_temperature) * (x.flatten(0, -3) @ codes.t())).softmax(-1)
        entropies = _clamped_entropy(probabilities)
        if mask is None:
            sample, mean = entropies.mean(), probabilities.mean(0)
        else:
            weight = mask.flatten(0, -2).to(x.dtype)
            weight = weight / weight.sum(0).clamp(min=1)
            sample = (weight * entropies).sum(0).mean()
            mean = (weight[..., None] * probabilities).sum(0)
        if by_token:  # upstream 1.32.0 does not take the mean over the rows of such a mask
            return sample, sample
        if _processes.world_size() > 1:
            mean = _processes.mean(mean)
        return sample, _clamped_entropy(mean).mean()

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Another version of VQP."""
        return missing_attributes(module, _ATTRIBUTES)

    def probe(self) -> tuple[Any, ...]:
        """Rows in the layout that the module takes."""
        parameter = next(self.parameters(), self.codebook)
        rows = torch.randn(2, 6, self.dim, device=self.codebook.device, dtype=parameter.dtype)
        return (rows.movedim(-1, 1) if self.channel_first else rows,)


def _clamped_entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=1e-5).log()).sum(-1)
