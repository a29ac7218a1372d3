"""LAPA's ``NSVQ``: noise substitution of what changed between two frames.

Same constructor, forward, returns, state_dict keys, indices, gradients, usage counts and random draws as
``laq_model.nsvq.NSVQ``. Reproduced because checkpoints or seeds depend on it:

- ``decode`` reshapes (b·n, D) to (b, D, n): for n > 1 it hands ``project_out`` rows that interleave the codes of a
  sample, out[b, i, d] = flat[b, d·n + i].
- ``codebooks_used`` counts the forwards in which a code appeared, not its rows; evaluation counts as well. It is no
  buffer: neither saved nor moved with the module.
- The noise comes from torch's CPU generator whatever the device, in one draw per forward (also where it is not used).

Different, because upstream's is an error:

- Where a row lies on its code (r = 0) upstream's gradient is NaN; here that row pulls neither itself nor the code.
- A row that is not finite is quantised to NaN and is in no count; it gets index 0.
- ``codebook_reinit`` draws into the parameter that an optimiser holds, instead of replacing it, and
  ``replace_unused_codebooks`` also replaces codes that are NaN.
- Nothing is printed; replacements are logged at level INFO.

Between processes nothing is synchronised, as upstream: each has its own ``codebooks_used`` and noise, and
``replace_unused_codebooks`` then leaves each with its own codebook. Call it on one process and broadcast ``codebooks``.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamkernels.compat.base import Compat
from lamkernels.compat.structure import difference
from lamkernels.functional import lookup, nearest_code
from lamkernels.ops.constants import NOISE_EPS
from lamkernels.steps import code_step, noise_step

logger = logging.getLogger(__name__)

CONVOLUTIONS: dict[int, tuple[Any, ...]] = {  # (size, stride, padding) by code_seq_len
    1: ((3, 2, 1), (4, 1, 0)),
    2: ((3, 2, 1), ((3, 4), 1, 0)),
    4: ((3, 2, 1), (3, 1, 0)),
    16: ((3, 2, 1), (3, 2, 1)),
    64: ((3, 2, 1),),
    256: ((3, 2, 1),),
}


class NSVQ(Compat):
    """LAPA's ``NSVQ``, quantised in one fused pass.

    Args:
        dim: size of the features of a frame.
        num_embeddings: K, the number of codes.
        embedding_dim: D, the size of a code.
        device: of the codebook and of what ``replace_unused_codebooks`` draws; the layers are made on the default one.
        discarding_threshold: a code used in a smaller share of the batches is unused.
        initialization: of the codebook: "normal", N(0, 1), or "uniform", U(±1/K).
        code_seq_len: n, the codes of a frame pair: 1, 2, 4, 16, 64 or 256.
        patch_size: with ``image_size``, the grid of features: HW is (image_size / patch_size)².
        image_size: see ``patch_size``.

    Attributes:
        numpy_usage: True (default): the forward returns ``codebooks_used`` as numpy, as upstream, which waits for a
            GPU. False: as the tensor, and a forward waits for nothing.
        device_noise: False (default): noise from the CPU generator, as upstream, copied to a GPU. True: drawn on the
            device of the features, which a CUDA graph can capture; another stream of random numbers.

    Raises:
        ValueError: ``initialization`` or ``code_seq_len`` is not one of those.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ("NSVQ",)
    numpy_usage = True
    device_noise = False

    def __init__(
        self,
        dim: int,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str = "cpu",
        discarding_threshold: float = 0.1,
        initialization: str = "normal",
        code_seq_len: int = 1,
        patch_size: int = 32,
        image_size: int = 256,
    ) -> None:
        super().__init__()
        if initialization not in ("normal", "uniform"):
            raise ValueError(f"initialization is {initialization!r}; it must be one of 'normal', 'uniform'")
        if code_seq_len not in CONVOLUTIONS:
            raise ValueError(f"code_seq_len is {code_seq_len}; it must be one of {', '.join(map(str, CONVOLUTIONS))}")
        self.dim, self.num_embeddings, self.embedding_dim = dim, num_embeddings, embedding_dim
        self.device, self.discarding_threshold, self.eps = torch.device(device), discarding_threshold, NOISE_EPS
        self.patch_size, self.image_size = patch_size, image_size
        if initialization == "normal":
            codebooks = torch.randn(num_embeddings, embedding_dim, device=device)
        else:  # U(low, high) as torch.distributions draws it: on the CPU, scaled
            codebooks = torch.rand(num_embeddings, embedding_dim).mul_(2 / num_embeddings).sub_(1 / num_embeddings)
        self.codebooks = nn.Parameter(codebooks)
        self.codebooks_used = torch.zeros(num_embeddings, dtype=torch.int32, device=device)
        self.project_in = nn.Linear(dim, embedding_dim)
        self.project_out = nn.Linear(embedding_dim, dim)
        layers: list[nn.Module] = []
        for size, stride, padding in CONVOLUTIONS[code_seq_len]:
            layers += [nn.ReLU()] if layers else []
            layers.append(nn.Conv2d(embedding_dim, embedding_dim, size, stride, padding))
        self.cnn_encoder = nn.Sequential(*layers)

    def encode(self, input_data: Tensor, batch_size: int) -> Tensor:
        """Features (b, HW, dim) of a frame as rows (b·n, D)."""
        side = int(self.image_size / self.patch_size)
        features = self.project_in(input_data).permute(0, 2, 1).contiguous()
        maps = self.cnn_encoder(features.reshape(batch_size, self.embedding_dim, side, side))
        rows: Tensor = maps.flatten(2).permute(0, 2, 1).reshape(-1, self.embedding_dim)
        return rows

    def decode(self, quantized_input: Tensor, batch_size: int) -> Tensor:
        """Rows (b·n, D) as (b, n, dim), interleaved as upstream interleaves them (see above)."""
        mixed = quantized_input.reshape(batch_size, self.embedding_dim, -1).permute(0, 2, 1).contiguous()
        decoded: Tensor = self.project_out(mixed)
        return decoded

    def forward(
        self,
        input_data_first: Tensor,
        input_data_last: Tensor,
        codebook_training_only: bool = False,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Any, Tensor]:
        """Quantises the difference of two frames.

        Args:
            input_data_first: (b, HW, dim) features of the first frame.
            input_data_last: (b, HW, dim) features of the last one.
            codebook_training_only: quantise to the codes themselves, with the gradient to them alone.
            noise: (b·n, D): in place of what would be drawn.

        Returns:
            quantized (b, n, dim); perplexity () of the batch; codebooks_used (K,) int32, see ``numpy_usage``;
            indices (b, n) int64.
        """
        batch = input_data_first.shape[0]
        first, last = self.encode(input_data_first, batch), self.encode(input_data_last, batch)
        if noise is None:
            noise = self._draw(last)
        used = self.codebooks_used
        if used.device != last.device:  # it stays behind where the module moves
            self.codebooks_used = used = used.to(last.device)
        if codebook_training_only:
            quantized, indices, perplexity = code_step(last - first, self.codebooks, used)
        else:
            quantized, indices, perplexity = noise_step(last, first, self.codebooks, noise, used)
        counted = used.cpu().numpy() if self.numpy_usage else used
        return self.decode(quantized, batch), perplexity, counted, indices.reshape(batch, -1)

    def _draw(self, rows: Tensor) -> Tensor:
        if rows.is_cpu and rows.dtype == torch.get_default_dtype() and rows.is_contiguous():
            return torch.randn_like(rows)  # the same numbers, sooner
        if rows.is_cpu or self.device_noise:
            return torch.randn(*rows.shape, device=rows.device)
        return torch.randn(rows.shape, pin_memory=True).to(rows.device, non_blocking=True)

    @torch.no_grad()
    def replace_unused_codebooks(self, num_batches: int) -> None:
        """Moves the unused codes onto used ones, and starts a new count.

        A code is unused where it appeared in less than ``discarding_threshold`` of ``num_batches``. The used codes, in
        the order of their indices, or tiled and shuffled where they are fewer, replace the unused ones, with 1e-12 of
        noise; where no code is used, all get that noise. How many random numbers are drawn depends on the counts, so
        this waits for a GPU: call it between steps.
        """
        share = self.codebooks_used.cpu() / num_batches
        unused = torch.where(share < self.discarding_threshold)[0]
        used = torch.where(share >= self.discarding_threshold)[0]
        codebook = self.codebooks
        if len(used) == 0:
            codebook.add_(torch.randn(codebook.shape, device=self.device).to(codebook), alpha=self.eps)
        else:
            codes = codebook[used.to(codebook.device)]
            if len(used) < len(unused):
                codes = codes.repeat(int(len(unused) / (len(used) + self.eps) + 1), 1)
                codes = codes[torch.randperm(len(codes)).to(codes.device)]
            noise = torch.randn(len(unused), self.embedding_dim, device=self.device).to(codes)
            codebook[unused.to(codebook.device)] = codes[: len(unused)] + self.eps * noise
        logger.info("replaced %d of %d codes", len(unused), self.num_embeddings)
        self.codebooks_used.zero_()

    def inference(
        self, input_data_first: Tensor, input_data_last: Tensor, user_action_token_num: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The codes themselves, without noise or counts.

        Args:
            input_data_first: (b, HW, dim) features of the first frame.
            input_data_last: (b, HW, dim) features of the last one.
            user_action_token_num: an index to take for every code, or a list of b·n, instead of the nearest.

        Returns:
            quantized (b, n, dim) and indices (b, n) int64.
        """
        batch, codebook = input_data_first.shape[0], self.codebooks.detach()
        first = self.encode(input_data_first.detach(), batch)
        rows = self.encode(input_data_last.detach(), batch) - first
        if user_action_token_num is None:
            indices = nearest_code(rows.to(codebook.dtype), codebook)
            return self.decode(lookup(indices, codebook), batch), indices.clamp(min=0).reshape(batch, -1)
        if isinstance(user_action_token_num, list):
            indices = torch.tensor(user_action_token_num, device=codebook.device)
        else:
            indices = torch.full(rows.shape[:1], int(user_action_token_num), device=codebook.device)
        return self.decode(codebook[indices], batch), indices.reshape(batch, -1)

    @torch.no_grad()
    def codebook_reinit(self) -> None:
        """Draws the codebook from N(0, 1), in place, and starts a new count."""
        self.codebooks.copy_(torch.randn(self.num_embeddings, self.embedding_dim, device=self.device))
        self.codebooks_used.zero_()

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module named NSVQ is not LAPA's, in words; None where it is."""
        found = difference(
            module,
            attributes={
                "num_embeddings": int,
                "embedding_dim": int,
                "dim": int,
                "image_size": int,
                "patch_size": int,
                "discarding_threshold": (int, float),
                "eps": float,
                "device": (str, torch.device),
                "codebooks_used": Tensor,
            },
            children=("project_in", "project_out", "cnn_encoder"),
            tensors={"codebooks": ("num_embeddings", "embedding_dim")},
        )
        if found is None and module.codebooks_used.dtype != torch.int32:
            return f"its codebooks_used is {module.codebooks_used.dtype}; LAPA's is int32"
        if found is None and module.eps != NOISE_EPS:
            return f"its eps is {module.eps}; LAPA's is {NOISE_EPS}"
        return found

    def probe(self) -> tuple[Tensor, Tensor]:
        """Random features of two frames of two samples."""
        shape = 2, int(self.image_size / self.patch_size) ** 2, self.dim
        first, last = (torch.randn(shape).to(self.codebooks) for _ in range(2))
        return first, last
