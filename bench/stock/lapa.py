"""LAPA's bottleneck: noise substitution (Vali and Bäckström 2022) of the difference of two frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal, Uniform

KERNELS: dict[int, tuple[Any, ...]] = {
    # code_seq_len: (size, stride, padding) of each convolution
    1: ((3, 2, 1), (4, 1, 0)),
    2: ((3, 2, 1), ((3, 4), 1, 0)),
    4: ((3, 2, 1), (3, 1, 0)),
    16: ((3, 2, 1), (3, 2, 1)),
    64: ((3, 2, 1),),
    256: ((3, 2, 1),),
}


class NSVQ(nn.Module):
    """first, last (b, HW, dim) -> quantized (b, n, dim), perplexity (), codebooks_used (K,) numpy, indices (b, n)."""

    def __init__(
        self,
        dim: int,
        num_embeddings: int,
        embedding_dim: int,
        device: Any = torch.device("cpu"),  # noqa: B008
        discarding_threshold: float = 0.1,
        initialization: str = "normal",
        code_seq_len: int = 1,
        patch_size: int = 32,
        image_size: int = 256,
    ) -> None:
        super().__init__()
        self.dim, self.num_embeddings, self.embedding_dim = dim, num_embeddings, embedding_dim
        self.device, self.discarding_threshold, self.eps = device, discarding_threshold, 1e-12
        self.patch_size, self.image_size = patch_size, image_size
        shape = (num_embeddings, embedding_dim)
        if initialization == "normal":
            codebooks = torch.randn(shape, device=device)
        elif initialization == "uniform":
            codebooks = Uniform(-1 / num_embeddings, 1 / num_embeddings).sample(shape)
        else:
            raise ValueError(f"initialization is {initialization!r}")
        self.codebooks = nn.Parameter(codebooks)
        self.codebooks_used = torch.zeros(num_embeddings, dtype=torch.int32, device=device)
        self.project_in = nn.Linear(dim, embedding_dim)
        self.project_out = nn.Linear(embedding_dim, dim)
        if code_seq_len not in KERNELS:
            raise ValueError(f"code_seq_len is {code_seq_len}")
        layers: list[nn.Module] = []
        for size, stride, padding in KERNELS[code_seq_len]:
            layers += [nn.ReLU()] if layers else []
            layers.append(nn.Conv2d(embedding_dim, embedding_dim, size, stride, padding))
        self.cnn_encoder = nn.Sequential(*layers)

    def encode(self, input_data: Tensor, batch_size: int) -> Tensor:
        side = int(self.image_size / self.patch_size)
        maps = self.project_in(input_data).permute(0, 2, 1).contiguous()
        maps = self.cnn_encoder(maps.reshape(batch_size, self.embedding_dim, side, side))
        rows: Tensor = maps.reshape(batch_size, self.embedding_dim, -1).permute(0, 2, 1).contiguous()
        return rows.reshape(-1, self.embedding_dim)

    def decode(self, quantized_input: Tensor, batch_size: int) -> Tensor:
        mixed = quantized_input.reshape(batch_size, self.embedding_dim, -1).permute(0, 2, 1).contiguous()
        decoded: Tensor = self.project_out(mixed)
        return decoded

    @staticmethod
    def _nearest(rows: Tensor, codes: Tensor) -> Tensor:
        distances = (
            torch.sum(rows**2, dim=1, keepdim=True)
            - 2 * torch.matmul(rows, codes.t())
            + torch.sum(codes.t() ** 2, dim=0, keepdim=True)
        )
        return torch.argmin(distances, dim=1)

    def forward(self, input_data_first: Tensor, input_data_last: Tensor, codebook_training_only: bool = False) -> Any:
        batch = input_data_first.shape[0]
        first = self.encode(input_data_first.contiguous(), batch)
        rows = self.encode(input_data_last, batch) - first
        indices = self._nearest(rows, self.codebooks)
        hard = self.codebooks[indices]
        noise = Normal(0, 1).sample(rows.shape).to(self.device)  # type: ignore[no-untyped-call]
        residual = (rows - hard).square().sum(dim=1, keepdim=True).sqrt()
        length = noise.square().sum(dim=1, keepdim=True).sqrt()
        substituted = (residual / length + self.eps) * noise
        quantized = hard if codebook_training_only else rows + substituted

        onehot = torch.zeros(rows.shape[0], self.num_embeddings, device=rows.device)
        onehot.scatter_(1, indices.reshape(-1, 1), 1)
        usage = torch.mean(onehot, dim=0)
        perplexity = torch.exp(-torch.sum(usage * torch.log(usage + self.eps)))
        with torch.no_grad():
            self.codebooks_used[indices.cpu()] += 1  # once, however often a code appears
        out = self.decode(quantized, batch)
        return out, perplexity, self.codebooks_used.cpu().numpy(), indices.reshape(batch, -1)

    @torch.no_grad()
    def replace_unused_codebooks(self, num_batches: int) -> None:
        share = self.codebooks_used.cpu() / num_batches
        unused = torch.where(share < self.discarding_threshold)[0]
        used = torch.where(share >= self.discarding_threshold)[0]
        dead, alive = unused.shape[0], used.shape[0]
        if alive == 0:
            self.codebooks.add_(self.eps * torch.randn(self.codebooks.size(), device=self.device))
        else:
            codes = self.codebooks[used].clone()
            if alive < dead:
                codes = codes.repeat(int(dead / (alive + self.eps) + 1), 1)
                codes = codes[torch.randperm(codes.shape[0])]
            self.codebooks[unused] *= 0
            noise = torch.randn((dead, self.embedding_dim), device=self.device)
            self.codebooks[unused] += codes[range(dead)] + self.eps * noise
        self.codebooks_used[:] = 0

    def inference(self, input_data_first: Tensor, input_data_last: Tensor, user_action_token_num: Any = None) -> Any:
        batch, codes = input_data_first.shape[0], self.codebooks.detach().clone()
        first = self.encode(input_data_first.detach().clone(), batch)
        rows = (self.encode(input_data_last.detach().clone(), batch) - first).reshape(-1, self.embedding_dim)
        indices = self._nearest(rows, codes)
        if isinstance(user_action_token_num, list):
            indices = torch.tensor(user_action_token_num, device=self.device)
        elif user_action_token_num is not None:
            indices = torch.tensor([[user_action_token_num]], device=self.device).repeat(rows.shape[0], 1)
        return self.decode(codes[indices], batch), indices.reshape(batch, -1)

    def codebook_reinit(self) -> None:
        self.codebooks = nn.Parameter(torch.randn(self.num_embeddings, self.embedding_dim, device=self.device))
        self.codebooks_used = torch.zeros(self.num_embeddings, dtype=torch.int32, device=self.device)
