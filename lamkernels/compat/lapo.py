"""LAPO's ``VQEmbeddingEMA`` (LAOF has a copy): codebooks that are moving averages, several per row.

Same constructor, forward, returns, state_dict keys, indices, losses, gradients and evolution of the buffers as the
class of that name in LAPO's ``models.py``. Reproduced:

- A row (codebooks·D·latents,) holds dimension d of codebook n and latent l at (n·D + d)·latents + l. It is read in
  place.
- The update comes after the lookup, in training: c ← γc + (1 − γ)n; S = Σc; c ← (c + ε) / (S + Kε) · S, and the
  smoothed counts are kept; w ← γw + (1 − γ)Σx; e = w / c. ``ema_count`` starts at 0 and ``ema_weight`` at the codebook,
  so that a code that gets no row in the first steps is thrown far out.
- Between processes nothing is synchronised: with more than one, the codebooks drift apart, unless the caller averages
  ``ema_count``, ``ema_weight`` and ``embedding`` (:class:`lamkernels.VectorQuantize` sums its statistics).

Different: the buffers are updated in place, where upstream makes new ones in every step (which CUDA graphs and
references to them do not survive). A vector of D numbers that is not finite gives NaN, in its gradient too, and index
0, and is in no loss and no average. Of the perplexity, p log(p + 1e-10) is p log p.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lamkernels.compat.base import Compat
from lamkernels.compat.structure import difference
from lamkernels.functional import lookup, vector_quantize
from lamkernels.steps import map_step


class VQConfig(Protocol):
    """What the quantiser reads of LAPO's configuration."""

    num_codebooks: int
    num_discrete_latents: int
    emb_dim: int
    num_embs: int
    commitment_cost: float
    decay: float


class _Commit(torch.autograd.Function):
    """x, its codes and the mean square between them -> the codes and that mean, with the gradients of both to x.

    What the fused backward does, in the layout of x, which is not that of the kernel's rows.
    """

    @staticmethod
    def forward(x: Tensor, quantized: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        return quantized.view_as(quantized), loss.view_as(loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        x, quantized, _ = inputs
        ctx.save_for_backward(x, quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        x, quantized = ctx.saved_tensors
        return torch.addcmul(grad, x - quantized, grad_loss, value=2 / max(x.numel(), 1)), None, None


class VQEmbeddingEMA(Compat):
    """LAPO's ``VQEmbeddingEMA`` in one fused pass.

    Args:
        cfg: LAPO's ``VQConfig``, or anything with its fields; it is read in every forward.
        epsilon: ε of the smoothing.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("VQEmbeddingEMA",)
    embedding: Tensor
    ema_count: Tensor
    ema_weight: Tensor

    def __init__(self, cfg: VQConfig, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon, self.cfg = epsilon, cfg
        limit = 5 / cfg.num_embs
        embedding = torch.empty(cfg.num_codebooks, cfg.num_embs, cfg.emb_dim).uniform_(-limit, limit)
        self.register_buffer("embedding", embedding)
        self.register_buffer("ema_count", torch.zeros(cfg.num_codebooks, cfg.num_embs))
        self.register_buffer("ema_weight", embedding.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantises x (b, codebooks·D·latents).

        Returns:
            z_q, as x; loss (), the commitment; perplexity (), summed over the codebooks; indices
            (b, codebooks, latents, 1) int64.
        """
        cfg, batch = self.cfg, len(x)
        if x.numel() == batch * cfg.num_codebooks * cfg.emb_dim * cfg.num_discrete_latents:
            step = self._step(x, cfg.num_discrete_latents)
            if step is not None:
                z_q, loss, perplexity, indices = step
                return z_q, loss, perplexity, indices.permute(1, 0, 2).unsqueeze(-1)
        maps = x.view(batch, cfg.num_codebooks * cfg.emb_dim, cfg.num_discrete_latents, 1)
        z_q, loss, perplexity, indices = self.forward_2d(maps)
        return z_q.reshape(batch, -1), loss, perplexity, indices

    def forward_2d(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantises maps x (b, codebooks·D, h, w): z_q as x, loss, perplexity, indices (b, codebooks, h, w)."""
        books, _, dim = self.embedding.shape
        batch, channels, height, width = x.shape
        if channels != books * dim:
            raise ValueError(f"x has {channels} channels; {books} codebooks of {dim} dimensions take {books * dim}")
        step = self._step(x, height * width)
        if step is not None:
            z_q, loss, perplexity, indices = step
            return z_q, loss, perplexity, indices.view(books, batch, height, width).permute(1, 0, 2, 3)
        rows = x.detach().view(batch, books, dim, height * width).permute(1, 0, 3, 2)  # (books, b, h·w, D), strided
        if rows.dtype != self.embedding.dtype:  # under autocast: upstream's codes have the dtype of the codebook
            rows = rows.to(self.embedding.dtype)
        out = vector_quantize(rows, self.embedding)
        if self.training:
            self._update(out.counts, out.sums)
        usage = out.counts / (batch * height * width)
        quantized = out.quantized.permute(1, 0, 3, 2).reshape(x.shape)
        z_q, commitment = _Commit.apply(x, quantized, out.commitment_loss)  # type: ignore[no-untyped-call]
        return (
            z_q,
            self.cfg.commitment_cost * commitment.to(torch.promote_types(x.dtype, self.embedding.dtype)),
            torch.special.entr(usage).sum(-1).exp().sum(),
            out.indices.clamp(min=0).view(books, batch, height, width).permute(1, 0, 2, 3),
        )

    def _step(self, x: Tensor, places: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        averages = (self.ema_count, self.ema_weight) if self.training else None
        rates = self.cfg.decay, self.epsilon
        return map_step(x, self.embedding, averages, rates, self.cfg.commitment_cost, places)

    @torch.no_grad()
    def _update(self, counts: Tensor, sums: Tensor) -> None:
        decay, count, weight = self.cfg.decay, self.ema_count, self.ema_weight
        count.mul_(decay).add_(counts, alpha=1 - decay)
        total = count.sum(-1, keepdim=True)
        count.add_(self.epsilon).mul_(total / (total + count.shape[-1] * self.epsilon))
        weight.mul_(decay).add_(sums, alpha=1 - decay)
        torch.div(weight, count.unsqueeze(-1), out=self.embedding)

    def inds_to_z_q(self, indices: Tensor) -> Tensor:
        """The vectors of indices (b, codebooks, height, width): (b, codebooks·D, height, width). In evaluation only."""
        assert not self.training, "inds_to_z_q is for evaluation: call eval() first"
        books, _, dim = self.embedding.shape
        batch, _, height, width = indices.shape
        codes = lookup(indices.permute(1, 0, 2, 3), self.embedding)  # (books, b, h, w, D)
        return codes.permute(1, 0, 4, 2, 3).reshape(batch, books * dim, height, width)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module named VQEmbeddingEMA is not LAPO's, in words; None where it is."""
        cfg = getattr(module, "cfg", None)
        lacking = [name for name in VQConfig.__annotations__ if not hasattr(cfg, name)]
        if lacking:
            return f"its cfg has no {', '.join(lacking)}"
        assert cfg is not None
        books, codes, dim = cfg.num_codebooks, cfg.num_embs, cfg.emb_dim
        return difference(
            module,
            attributes={"epsilon": (int, float)},
            children=(),
            tensors={
                "embedding": (books, codes, dim),
                "ema_count": (books, codes),
                "ema_weight": (books, codes, dim),
            },
        )

    def probe(self) -> tuple[Tensor]:
        """Random rows (2, codebooks·D·latents)."""
        books, _, dim = self.embedding.shape
        return (torch.randn(2, books * dim * self.cfg.num_discrete_latents).to(self.embedding),)
