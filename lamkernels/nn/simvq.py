"""``SimVQ``: vector quantisation with a learned transform of a frozen codebook, as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamkernels.functional import lookup, vector_quantize
from lamkernels.nn.indices import module_indices
from lamkernels.validation import BACKENDS, PRECISIONS, Backend, Precision, check_integer, check_option, check_weight


class SimVQ(nn.Module):
    """A bottleneck whose codebook is C = W·C₀ (Zhu et al. 2024): ``quantized, indices, loss = simvq(x)``.

    C₀ is random and frozen; only the transform is learned. A gradient step for one code moves all of them, so that
    codes that no row chooses do not die. The loss is that of a learned codebook,

        loss = codebook_weight · mean((sg x − q)²) + commitment_weight · mean((x − sg q)²),

    in eval mode too, and its first term trains the transform through the fused codebook gradient
    −2 Σ(x − c_k) / (n·D). The gradient of ``quantized`` passes straight through to x.

    Args:
        dim: D, the size of a row.
        codebook_size: K, the number of codes.
        frozen_dim: size of the frozen codes; None means D.
        code_transform: a module from (K, frozen_dim) to (K, D); None means a linear layer without bias.
        commitment_weight: weight of the commitment loss in ``loss``.
        codebook_weight: weight of the codebook loss in ``loss``.
        precision: as for :func:`lamkernels.nearest_code`.
        backend: as for :func:`lamkernels.nearest_code`.
        device: of the codebook and of the linear layer.
        dtype: of the codebook and of the linear layer, float32 or float64.

    Shape:
        x (..., D) -> quantized (..., D) in the dtype of x, indices (...,) int64, loss () fp32. A row that is not finite
        is quantised to NaN and gets index 0 (−1 would trip the assertions of an embedding or a cross entropy).

    State:
        frozen_codebook (K, frozen_dim), drawn from a normal distribution of variance 1 / frozen_dim, and the parameters
        of code_transform.

    Raises:
        ValueError: an argument is out of its range, or the transform does not return (K, D), named in the message.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        frozen_dim: int | None = None,
        code_transform: nn.Module | None = None,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        precision: Precision = "default",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_option("precision", precision, PRECISIONS)
        check_option("backend", backend, BACKENDS)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; it must be float32 or float64")
        frozen_dim = dim if frozen_dim is None else frozen_dim
        for name, value in (("dim", dim), ("codebook_size", codebook_size), ("frozen_dim", frozen_dim)):
            check_integer(name, value)
        check_weight("commitment_weight", commitment_weight)
        check_weight("codebook_weight", codebook_weight)
        self.dim, self.codebook_size = dim, codebook_size
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.precision, self.backend = precision, backend
        frozen = torch.randn(codebook_size, frozen_dim, device=device, dtype=dtype) * frozen_dim**-0.5
        self.register_buffer("frozen_codebook", frozen)
        if code_transform is None:
            code_transform = nn.Linear(frozen_dim, dim, bias=False, device=device, dtype=dtype)
        self.code_transform = code_transform

    @property
    def codebook(self) -> Tensor:
        """C (K, D), differentiable in the parameters of the transform; not rounded to half under autocast."""
        with torch.autocast(self.frozen_codebook.device.type, enabled=False):
            codes: Tensor = self.code_transform(self.frozen_codebook)
        if codes.shape != (self.codebook_size, self.dim):
            raise ValueError(
                f"code_transform returned shape {tuple(codes.shape)}; it must be ({self.codebook_size}, {self.dim})"
            )
        return codes

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises x (..., D); ``mask`` (...,) bool is False for rows to leave out, which are quantised to zero."""
        out = vector_quantize(x, self.codebook, mask=mask, precision=self.precision, backend=self.backend)
        loss = self.codebook_weight * out.codebook_loss + self.commitment_weight * out.commitment_loss
        return out.quantized, module_indices(out.indices, mask), loss

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes (..., D) of indices (...,) int64, NaN where the index is −1; differentiable in the transform."""
        return lookup(indices, self.codebook)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}"
