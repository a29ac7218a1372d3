"""The bottleneck of villa-X and of IGOR, its latent action model: 32 codes of 128, four to an action."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from lamkernels.compat.vector_quantizer2 import VectorQuantizer2Family, check_for_gumbel


class VectorQuantizer2(VectorQuantizer2Family):
    """villa-X's ``VectorQuantizer2``: ``z_q, loss, (None, None, indices) = vq(z)``.

    The codes are N(0, 1) until the model draws them again from U(±1/n_e), which villa-X's does.

    Args:
        n_e: K, the number of codes.
        e_dim: D, the size of a row.
        beta: β, weight of the commitment loss, or with ``legacy`` of the codebook loss.
        remap: None, or the path of an .npy file with the (R,) codes that are in use: indices are then positions in it.
        unknown_index: what a code that is not in it becomes: "random", "extra" (R), or an int.
        sane_index_shape: indices (b, w, c) for z (b, h, w, c). Upstream forgot to move the channels to the second
            axis, so that this works only where h = c; elsewhere a ValueError says so, as upstream's reshape fails.
        legacy: loss = commitment + β·codebook instead of β·commitment + codebook.

    Shape:
        z of N·D entries, rows of D in memory order (villa-X passes (b, 1, 4·D)) -> z_q in the shape of z, loss (),
        indices (N,) int64, with ``remap`` (N, 1). z in half precision gives z_q and loss in the fp32 of the codebook,
        as upstream under autocast; distances are fp32 on a CPU too, where upstream lets autocast round them.
        A row that is not finite is quantised to NaN, gets index 0 and is in no loss, where upstream's loss is NaN.

    Raises:
        ValueError: an argument that upstream refuses, a shape without rows of D, or an unknown ``unknown_index``.
    """

    upstream_names = ("VectorQuantizer2",)

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | os.PathLike[str] | None = None,
        unknown_index: int | str = "random",
        sane_index_shape: bool = False,
        legacy: bool = False,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)

    @property
    def codebook(self) -> Tensor:
        """(K, D): the weight of ``embedding``."""
        return self.embedding.weight

    def forward(
        self,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
        use_entropy_loss: bool = False,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor], tuple[None, None, Tensor]]:
        """Quantises z; ``use_entropy_loss`` makes loss (loss, :meth:`entropy_loss`), which takes an N×K matrix."""
        check_for_gumbel(temp, rescale_logits, return_logits)
        z, weight = self._as_computed(z)
        z_q, loss, indices = self._quantize(z, weight)
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(z.shape[0], -1)).reshape(-1, 1)
        if self.sane_index_shape:
            if z.ndim < 4 or indices.numel() != z.shape[0] * z.shape[2] * z.shape[3]:
                raise ValueError(
                    f"z has shape {tuple(z.shape)}; with sane_index_shape it must be (b, h, w, c) with h = c, because "
                    "villa-X takes its axes for those of (b, c, h, w)"
                )
            indices = indices.reshape(z.shape[0], z.shape[2], z.shape[3])
        if use_entropy_loss:
            return z_q, (loss, self.entropy_loss(-self._distances(z))), (None, None, indices)
        return z_q, loss, (None, None, indices)

    def entropy_loss(
        self, affinity: Tensor, loss_type: str = "softmax", temperature: float = 0.01, ratio: float = 0.1
    ) -> Tensor:
        """``ratio`` · (mean of the rows' entropies − entropy of their mean), of p = softmax(affinity / temperature).

        Args:
            affinity: (..., K), the negative squared distances. Left as it is, where upstream divides it in place.
            loss_type: "softmax"; or "argmax": one-hot rows with the gradient of p.
            temperature: of the softmax.
            ratio: weight of the result.

        Raises:
            ValueError: loss_type is neither.
        """
        if loss_type not in ("softmax", "argmax"):
            raise ValueError(f"loss_type is {loss_type!r}; it must be one of 'softmax', 'argmax'")
        logits = affinity.reshape(-1, affinity.shape[-1]) / temperature
        log_p = logits.log_softmax(-1)
        p = target = logits.softmax(-1)
        if loss_type == "argmax":
            chosen = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(p.dtype)
            target = chosen + (p - p.detach())
        mean = target.mean(0)
        sample = -(target * log_p).sum(-1).mean()
        return ratio * (sample + (mean * (mean + 1e-5).log()).sum())

    def _distances(self, z: Tensor) -> Tensor:
        """(N, K), with a gradient: for the entropy alone, whose softmax needs them all."""
        rows, codes = z.reshape(-1, self.e_dim), self.embedding.weight
        with torch.autocast(z.device.type, enabled=False):
            return rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.T

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """The codes (..., D) of indices; with ``shape`` (b, h, w, D) as (b, D, h, w). ``remap`` needs the shape."""
        return self._codebook_entry(indices, shape)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if hasattr(module, "setup_remap"):
            return "it has a setup_remap, by which Moto's differs from it"
        return super().refusal(module)

    def probe(self) -> tuple[Any, ...]:
        return (
            self._probe_rows(2, self.e_dim, 1, self.e_dim)
            if self.sane_index_shape
            else self._probe_rows(2, 3, self.e_dim),
        )
