"""UniVLA's ``VectorQuantizer``: a codebook that learns by gradient, whose losses the caller computes.

Same constructor, forward, returns, state_dict key (``codebook.weight``), indices, gradients, usage counts and random
draws as the class of that name in UniVLA's ``latent_action_model.genie.modules.blocks`` (and its copies, such as
Olaf-World's). Reproduced: ``usage`` counts, for each code, the rows of the first axis of x in which it appears, once a
row; it counts in evaluation too, and in training only with ``code_restart``; a row that is not finite has index 0 and
is counted there. ``z`` and ``z_q`` are as upstream: the embedding of the indices, and x + (z − x), NaN where x is.

Different: ``random_restart`` draws the same codes without asking a GPU how many there are, and prints nothing. An x
without a row axis, (D,), counts as one row (upstream raises). The distances of cdist are those of plain differences for
few rows and lose digits for many; here all meet the numerics contract.

Between processes nothing is synchronised, as upstream: each has its own ``usage`` and draws, and ``random_restart``
then leaves each with its own codebook. Call it on one process and broadcast ``codebook.weight``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamkernels.compat.base import Compat
from lamkernels.compat.structure import beyond_lookup, difference
from lamkernels.eager import routed
from lamkernels.functional import nearest_code
from lamkernels.steps import count_groups, gradient_step


class VectorQuantizer(Compat):
    """UniVLA's ``VectorQuantizer``, without the distance matrix and the loop over the batch.

    Args:
        num_latents: K, the number of codes.
        latent_dim: D, the size of a code.
        code_restart: count which codes are used, so that ``random_restart`` can replace the others.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("VectorQuantizer",)
    usage: Tensor

    def __init__(self, num_latents: int, latent_dim: int, code_restart: bool = True) -> None:
        super().__init__()
        self.codebook = nn.Embedding(num_latents, latent_dim)
        self.codebook.weight.data.uniform_(-1.0 / num_latents, 1.0 / num_latents)
        self.register_buffer("usage", torch.zeros(num_latents), persistent=False)
        self.num_latents = num_latents
        self.code_restart = code_restart

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantises x (..., D).

        Returns:
            z_q (..., D): the codes, with the gradient to x (straight-through). z (..., D): the codes, with the gradient
            to the codebook; the loss is the caller's, mse(x.detach(), z) + 0.25 · mse(x, z.detach()). x itself.
            indices (...,) int64.
        """
        counts = not self.training or self.code_restart
        if self._is_as_made():
            z_q, z, indices = gradient_step(x, self.codebook.weight, self.usage if counts else None)
            return routed(z_q, x), z, x, indices
        indices = nearest_code(x, self.codebook.weight).clamp_(min=0)
        z = self.codebook(indices)
        if counts:
            self.update_usage(indices)
        return x + (z - x).detach(), z, x, indices

    def _is_as_made(self) -> bool:
        """Whether nothing of the codebook and of this class is changed, which a fused lookup would pass by."""
        as_made: bool = type(self).update_usage is VectorQuantizer.update_usage
        return as_made and type(self.codebook) is nn.Embedding and beyond_lookup(self.codebook) is None

    @torch.no_grad()
    def update_usage(self, min_enc: Tensor) -> None:
        """Adds 1 to the usage of a code for each row of the first axis of ``min_enc`` (B, ...) that has it."""
        count_groups(min_enc, self.usage)

    @torch.no_grad()
    def random_restart(self) -> None:
        """Overwrites the codes that were not used with codes drawn from the whole codebook."""
        if not self.code_restart:
            return
        dead, weight = self.usage < 1, self.codebook.weight
        drawn = torch.randperm(self.num_latents).to(weight.device, non_blocking=True)
        order = (dead.cumsum(0) - 1).clamp_(min=0)  # the first dead code gets the first one drawn, and so on
        source = torch.where(dead, drawn[order], torch.arange(self.num_latents, device=weight.device))
        weight.copy_(weight[source])

    @torch.no_grad()
    def reset_usage(self) -> None:
        """Starts a new count."""
        if self.code_restart:
            self.usage.zero_()

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module named VectorQuantizer is not UniVLA's, in words; None where it is."""
        found = difference(
            module,
            attributes={"num_latents": int, "code_restart": bool, "codebook": nn.Embedding},
            children=("codebook",),
            tensors={"usage": ("num_latents",)},
        )
        if found is not None:
            return found
        codebook: Any = module.codebook
        if codebook.num_embeddings != module.num_latents:
            return f"its codebook has {codebook.num_embeddings} codes; its num_latents is {module.num_latents}"
        return None

    def probe(self) -> tuple[Tensor]:
        """Random rows (2, 4, D)."""
        weight = self.codebook.weight
        return (torch.randn(2, 4, weight.shape[1]).to(weight),)
