"""open-genie's lookup-free quantiser in plain torch: an N × 2^d matrix of probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LookupFreeQuantization(nn.Module):
    """((out, idxs), loss), loss None in eval mode."""

    def __init__(
        self,
        d_codebook: int,
        n_codebook: int = 1,
        input_dim: int | None = None,
        use_bias: bool = True,
        frac_sample: float = 1.0,
        commit_weight: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
    ) -> None:
        super().__init__()
        width = d_codebook * n_codebook
        project = input_dim is not None and input_dim != width
        self.proj_inp = nn.Linear(input_dim or width, width, bias=use_bias) if project else nn.Identity()
        self.proj_out = nn.Linear(width, input_dim or width, bias=use_bias) if project else nn.Identity()
        self.n_codebook = n_codebook
        self.frac_sample = frac_sample
        self.commit_weight = commit_weight
        self.entropy_weight = entropy_weight
        self.diversity_weight = diversity_weight
        self.register_buffer("bit_mask", torch.tensor([2**d for d in reversed(range(d_codebook))]))
        codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * d_codebook).reshape(-1, d_codebook)
        self.register_buffer("codebook", codes, persistent=False)

    def forward(
        self, inp: Tensor, beta: float = 100.0, transpose: bool = False
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        inp = inp.movedim(1, -1) if transpose else inp
        middle = inp.shape[1:-1]
        x = self.proj_inp(inp.reshape(len(inp), -1, inp.shape[-1])).unflatten(-1, (self.n_codebook, -1))  # (b, n, c, d)
        q = x.sign()
        idxs = ((x > 0).int() * self.bit_mask.int()).sum(-1)
        code = x + (q - x).detach() if self.training else q
        out = self.proj_out(code.flatten(2)).unflatten(1, middle) if middle else self.proj_out(code.flatten(2))[:, 0]
        idxs = idxs.reshape(len(inp), *middle, self.n_codebook).squeeze()
        if transpose:
            out = out.movedim(-1, 1)
            idxs = idxs.movedim(-1, 1)
        if not self.training:
            return (out, idxs), None
        p = torch.softmax(2 * beta * torch.einsum("bncd,kd->bnck", x, self.codebook), -1).flatten(0, 1)
        entropy = self._entropy(p).mean() + self.diversity_weight * self._entropy(p.mean(0)).mean()
        return (out, idxs), self.entropy_weight * entropy + self.commit_weight * F.mse_loss(x, q.detach())

    @staticmethod
    def _entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp(min=1e-6).log()).sum(-1)
