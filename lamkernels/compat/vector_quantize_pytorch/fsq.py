"""``FSQ`` of vector-quantize-pytorch over the fused finite scalar quantisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamkernels.compat.vector_quantize_pytorch._upstream import Delegating, missing_attributes
from lamkernels.lookup_free import finite_scalar_codes, finite_scalar_quantize

_ATTRIBUTES = (
    "_levels", "_basis", "preserve_symmetry", "noise_dropout", "codebook_dim", "num_codebooks", "dim",
    "keep_num_codebooks_dim", "channel_first", "project_in", "project_out", "has_projections", "return_indices",
    "allowed_dtypes", "force_quantization_f32", "bound_hard_clamp", "orthogonal_rotation",
)  # fmt: skip


class FSQ(Delegating):
    """VQP's ``FSQ``: ``quantized, indices = fsq(z)`` with int32 indices, None with ``return_indices=False``.

    The bounds by tanh are fused, ``bound_hard_clamp`` is plain torch, and ``noise_dropout`` runs in upstream's code in
    training mode. Levels are decided as in exact arithmetic, where upstream rounds in fp32: an entry within rounding of
    an edge may fall on the other side. A row that is not finite is quantised to NaN and has index 0.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("FSQ",)
    upstream_module: ClassVar[str] = "finite_scalar_quantization"

    _levels: Tensor
    _basis: Tensor
    implicit_codebook: Tensor
    orthogonal_rot: Tensor
    project_in: nn.Module
    project_out: nn.Module
    dim: int
    num_codebooks: int
    codebook_dim: int
    keep_num_codebooks_dim: bool
    channel_first: bool
    return_indices: bool
    preserve_symmetry: bool
    noise_dropout: float
    bound_hard_clamp: bool
    orthogonal_rotation: bool
    force_quantization_f32: bool
    allowed_dtypes: tuple[torch.dtype, ...]

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        levels = list(levels)
        if 2 in levels and not preserve_symmetry:
            raise AssertionError(f"levels are {levels}; two levels need preserve_symmetry=True")
        if noise_dropout > 0:
            if not preserve_symmetry:
                raise AssertionError("noise_dropout needs preserve_symmetry=True")
            self._upstream_class(f"noise_dropout={noise_dropout}")
        several = num_codebooks > 1
        keep = several if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        if several and not keep:
            raise AssertionError("keep_num_codebooks_dim is False; with several codebooks it must be True")
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int32), persistent=False)
        self.scale, self.preserve_symmetry, self.noise_dropout = scale, preserve_symmetry, noise_dropout
        self.codebook_dim, self.num_codebooks = len(levels), num_codebooks
        self.effective_codebook_dim = inner = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim, self.channel_first = keep, channel_first
        self.dim = inner if dim is None else dim
        self.has_projections = self.dim != inner
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, inner, bias=projection_has_bias)
            self.project_out = nn.Linear(inner, self.dim, bias=projection_has_bias)
        self.return_indices = return_indices
        if return_indices:
            self.codebook_size = math.prod(levels)
            codes = self._indices_to_codes(torch.arange(self.codebook_size))
            self.register_buffer("implicit_codebook", codes, persistent=False)
        self.allowed_dtypes, self.force_quantization_f32 = allowed_dtypes, force_quantization_f32
        self.bound_hard_clamp, self.orthogonal_rotation = bound_hard_clamp, orthogonal_rotation
        if orthogonal_rotation:
            rotation = nn.init.orthogonal_(torch.empty(self.codebook_dim, self.codebook_dim))
            self.register_buffer("orthogonal_rot", rotation)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantises z (B, ..., D); (B, D, ...) with ``channel_first`` and where it has four axes or more."""
        if self.training and self.noise_dropout > 0:
            quantized, indices = self._run_upstream("noise_dropout", "forward", z)
            return quantized, indices
        moved = z.ndim >= 4 or self.channel_first
        z = z.movedim(1, -1) if moved else z
        if z.shape[-1] != self.dim:
            raise AssertionError(f"z has {z.shape[-1]} channels; it must have {self.dim}")
        z = self.project_in(z)
        z = z.reshape(*z.shape[:-1], self.num_codebooks, self.codebook_dim)
        if self.orthogonal_rotation:
            z = z @ self.orthogonal_rot
        codes, places = self._quantize(z.float() if self._forces_f32(z.dtype) else z)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.t()
        out: Tensor = self.project_out(codes.flatten(-2).to(z.dtype))
        out = out.movedim(-1, 1) if moved else out
        if not self.return_indices:
            return out, None
        places = places.clamp(min=0).to(torch.int32)
        return out, places if self.keep_num_codebooks_dim else places.squeeze(-1)

    def quantize(self, z: Tensor) -> Tensor:
        """The codes of rows z (..., D); the gradient passes straight through the rounding."""
        return self._quantize(z)[0]

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Indices (...,) int32 of codes (..., D)."""
        if self.preserve_symmetry:
            positions = (zhat + 1.0) * (self._levels - 1) / 2.0
        else:
            positions = zhat * (self._levels // 2) + self._levels // 2
        return (positions * self._basis).sum(-1).round().to(torch.int32)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The position on each level (..., D) of indices (...,)."""
        return (indices[..., None] // self._basis) % self._levels

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The vectors of indices, in the layout of the forward's output."""
        moved = indices.ndim >= 3 + int(self.keep_num_codebooks_dim) or self.channel_first
        codes = self._indices_to_codes(indices)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.t()
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        out: Tensor = self.project_out(codes)
        return out.movedim(-1, 1) if moved else out

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """Upstream's rounding of z (..., D) in fp32, from its own code."""
        bounded: Tensor = self._run_upstream("bound", "bound", z, eps, hard_clamp)
        return bounded

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """Upstream's symmetric rounding of z (..., D) in fp32, from its own code."""
        bounded: Tensor = self._run_upstream("symmetry_preserving_bound", "symmetry_preserving_bound", z, hard_clamp)
        return bounded

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """The codes with upstream's noise in training mode, where ``noise_dropout`` asks for it."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        noisy: Tensor = self._run_upstream("noise_dropout", "maybe_apply_noise", bounded_z)
        return noisy

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        levels = self._host_levels()
        if not self.bound_hard_clamp:
            return finite_scalar_quantize(z, levels, symmetric=self.preserve_symmetry)
        finite = z.isfinite().all(-1)
        soft, positions = self._hard_clamped(z)
        indices = (positions.nan_to_num(0.0).long() * self._basis).sum(-1).masked_fill(~finite, 0)
        codes = finite_scalar_codes(indices, levels, symmetric=self.preserve_symmetry, dtype=z.dtype)
        codes = codes.masked_fill(~finite[..., None], torch.nan)
        return codes + (soft - soft.detach()), indices

    def _hard_clamped(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The codes before their rounding, for the gradient, and the positions that they are rounded to."""
        steps = self._levels - 1
        if self.preserve_symmetry:
            soft = z.clamp(-1.0, 1.0)
            return soft, (steps * (soft.detach() + 1) / 2.0 + 0.5).floor()
        half = steps * (1 + 1e-3) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        soft = (z + offset / half).clamp(-1.0, 1.0) * half - offset
        return soft / (self._levels // 2), soft.detach().round() + self._levels // 2

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        return finite_scalar_codes(indices.long(), self._host_levels(), symmetric=self.preserve_symmetry)

    def _forces_f32(self, dtype: torch.dtype) -> bool:
        return self.force_quantization_f32 and dtype not in self.allowed_dtypes

    def _host_levels(self) -> list[int]:
        """The levels as numbers, read from their buffer once."""
        levels: list[int] | None = self.__dict__.get("_level_counts")
        if levels is None:
            levels = self.__dict__["_level_counts"] = [int(level) for level in self._levels.tolist()]
        return levels

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Another version of VQP, or noise dropout."""
        reason = missing_attributes(module, _ATTRIBUTES)
        if reason is None and module.noise_dropout > 0:  # type: ignore[operator]
            reason = "noise_dropout has no fused form"
        return reason

    def probe(self) -> tuple[Any, ...]:
        """Rows in the layout that the module takes."""
        parameter = next(self.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        shape = (2, self.dim, 6) if self.channel_first else (2, 6, self.dim)
        return (torch.randn(shape, device=self._levels.device, dtype=dtype),)
