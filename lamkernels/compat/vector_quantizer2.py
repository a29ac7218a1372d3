"""What the ``VectorQuantizer2`` of villa-X and of Moto share: both come from the one of taming-transformers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lamkernels.compat.base import Compat
from lamkernels.compat.structure import beyond_lookup, difference
from lamkernels.eager import routed
from lamkernels.functional import quantize_with_loss


class VectorQuantizer2Family(Compat):
    """Gradient VQ with the straight-through estimator, β on one of the two losses, and indices that can be remapped.

    Args:
        n_e: K, the number of codes.
        e_dim: D, the size of a row.
        beta: β, weight of the commitment loss, or with ``legacy`` of the codebook loss.
        remap: None, or the path of an .npy file with the (R,) codes that are in use: indices are then positions in it.
        unknown_index: what a code that is not in it becomes: "random", one of the R positions; "extra", R; or an int.
        sane_index_shape: see the subclass.
        legacy: loss = commitment + β·codebook instead of β·commitment + codebook.

    State:
        embedding.weight (K, D), and with ``remap`` used (R,) int64.
    """

    embedding: nn.Embedding
    used: Tensor
    unknown_index: int | str

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | os.PathLike[str] | None,
        unknown_index: int | str,
        sane_index_shape: bool,
        legacy: bool,
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.remap: str | os.PathLike[str] | None = None
        self.re_embed = n_e
        if remap is not None:
            self._set_remap(remap, unknown_index)
        self.sane_index_shape = sane_index_shape

    def _set_remap(self, remap: str | os.PathLike[str], unknown_index: int | str) -> None:
        if isinstance(unknown_index, str) and unknown_index not in self._unknown_indices():
            allowed = ", ".join(map(repr, self._unknown_indices()))
            raise ValueError(f"unknown_index is {unknown_index!r}; it must be one of {allowed}, or an int")
        self.remap = remap
        self.register_buffer("used", torch.from_numpy(np.load(remap)))
        self.re_embed, self.unknown_index = self.used.shape[0], unknown_index
        if unknown_index == "extra":
            self.unknown_index = self.re_embed
            self.re_embed += 1

    @classmethod
    def _unknown_indices(cls) -> tuple[str, ...]:
        return "random", "extra"

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Codes (B, ...) int64 to their positions in ``used``, the first where one is there twice.

        "random" draws from torch's CPU generator, as many numbers as there are unknown codes: it waits for the GPU.
        """
        _check_batched(inds)
        match = inds[..., None] == self.used.to(inds)
        positions, unknown = match.int().argmax(-1), ~match.any(-1)
        if self.unknown_index == "random":
            drawn = torch.randint(0, self.re_embed, (int(unknown.sum()),))
            return positions.masked_scatter(unknown, drawn.to(positions.device))
        return positions.masked_fill(unknown, int(self.unknown_index))

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Positions (B, ...) int64 in ``used`` to codes; with ``unknown_index="extra"`` position R to the first code.

        Leaves ``inds`` as it is, where upstream writes the 0 of an extra position into it.
        """
        _check_batched(inds)
        if self.re_embed > self.used.shape[0]:
            inds = inds.masked_fill(inds >= self.used.shape[0], 0)
        return self.used.to(inds).index_select(0, inds.flatten()).reshape(inds.shape)

    def _as_computed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z and the codebook. Half precision rows become those of an fp32 codebook, as in upstream's arithmetic, under
        autocast as well.
        """
        weight = self.embedding.weight  # asked for once: an attribute of a module takes its time
        if z.numel() % self.e_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; its entries must make rows of e_dim = {self.e_dim}")
        return z if z.dtype == weight.dtype else z.to(torch.promote_types(z.dtype, weight.dtype)), weight

    def _quantize(self, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z as quantised rows in its shape, the weighted loss () and the indices (N,) int64."""
        quantized, indices, loss = quantize_with_loss(z, weight, *self._weights, whole_rows=True)
        return routed(quantized, z), loss if loss.dtype == z.dtype else loss.to(z.dtype), indices

    @property
    def _weights(self) -> tuple[float, float]:
        """Of the commitment loss and of the codebook loss."""
        return (1.0, self.beta) if self.legacy else (self.beta, 1.0)

    def _codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        if self.remap is not None:
            if shape is None:
                raise ValueError("shape is None; with remap it must be (b, h, w, D)")
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        codes: Tensor = self.embedding(indices)
        return codes if shape is None else codes.reshape(shape).permute(0, 3, 1, 2).contiguous()

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if not hasattr(module, "remap"):
            return "its remap is missing"
        used = getattr(module, "used", None)
        size = used.numel() if isinstance(used, Tensor) else 0
        found = difference(
            module,
            attributes={
                "embedding": nn.Embedding,
                "n_e": int,
                "e_dim": int,
                "beta": (int, float, Tensor),
                "legacy": bool,
                "re_embed": int,
                "sane_index_shape": bool,
            },
            children=("embedding",),
            tensors={} if module.remap is None else {"used": (size,)},
        )
        if found is not None:
            return found
        embedding: Any = module.embedding
        weight, beyond = embedding.weight, beyond_lookup(embedding)
        if beyond is not None:
            return f"its embedding {beyond}, which the fused lookup does not follow"
        if weight.shape != (module.n_e, module.e_dim) or not weight.is_floating_point():
            return f"embedding.weight is {weight.dtype} of {tuple(weight.shape)}; it must be floats of (n_e, e_dim)"
        unknown = getattr(module, "unknown_index", None)
        if module.remap is not None and not isinstance(unknown, int) and unknown not in cls._unknown_indices():
            return f"unknown_index is {unknown!r}; it must be one of {cls._unknown_indices()}, or an int"
        return None

    def _probe_rows(self, *shape: int) -> Tensor:
        """Rows that spread as the codes do, from a generator of their own."""
        weight = self.embedding.weight.detach()
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
        return rows * weight.float().std(correction=0).to(weight) + weight.float().mean().to(weight)


def check_for_gumbel(temp: float | None, rescale_logits: bool, return_logits: bool) -> None:
    """Arguments that upstream takes for the interface of its Gumbel quantiser, and refuses, else ValueError."""
    if temp is not None and temp != 1.0:
        raise ValueError(f"temp is {temp}; it must be None or 1.0: it is there for the interface of a Gumbel quantiser")
    for name, value in (("rescale_logits", rescale_logits), ("return_logits", return_logits)):
        if value is not False:
            raise ValueError(
                f"{name} is {value}; it must be False: it is there for the interface of a Gumbel quantiser"
            )


def _check_batched(inds: Tensor) -> None:
    if inds.ndim < 2:
        raise ValueError(f"inds has shape {tuple(inds.shape)}; it must be (B, ...), with an axis for the batch")
