"""Training steps of LAPA's and UniVLA's shape in plain torch: their sizes and kinds of layers, on random frames.

What decides the cost is here (sizes, depths, heads, attention over space and over T = 2 frames, gated feed-forwards,
positional convolutions, a frozen image encoder, the bottleneck); what does not is left out (losses beside the
reconstruction and the codebook's, language tokens, the network that makes LAPA's positional bias: a table is used).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lamkernels as lk
from lamkernels.compat import lapa, univla

from .stock import lapa as stock_lapa
from .stock import univla as stock_univla

Bottleneck = Literal["stock", "fused", "module"]


@dataclass(frozen=True)
class Sizes:
    """Of a step: pairs of frames of ``image``² pixels, in patches of ``patch``².

    Attributes:
        batch: pairs of frames.
        image: pixels on a side.
        patch: likewise.
        dim: of a token.
        heads: of an attention, each of 64.
        depth: layers of the encoder over space, of that over time, and of the decoder.
        frozen: layers of the frozen image encoder; 0 for an embedding that is learned.
    """

    batch: int
    image: int
    patch: int
    dim: int
    heads: int
    depth: int
    frozen: int

    @property
    def side(self) -> int:
        return self.image // self.patch


SIZES = {  # laq/train_sthv2.py of LAPA; the stage-1 configuration of UniVLA
    "lapa": Sizes(batch=64, image=256, patch=32, dim=1024, heads=16, depth=8, frozen=0),
    "univla": Sizes(batch=64, image=224, patch=14, dim=768, heads=12, depth=12, frozen=12),
}


class Attention(nn.Module):
    """x (B, T, S, D): over the tokens of a frame, over the frames of a token ("time"), or to a context (B, C, D)."""

    def __init__(self, kind: str, dim: int, heads: int, axis: str = "space", bias: int = 0) -> None:
        super().__init__()
        self.kind, self.heads, self.axis = kind, heads, axis
        self.norm, self.query = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.key_value, self.out = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(heads, bias, bias)) if bias else None

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        rows = self.norm(x.transpose(1, 2) if self.axis == "time" else x)
        lead, length, dim = rows.shape[:2], rows.shape[2], rows.shape[3]
        rows = rows.reshape(-1, length, dim)
        source = context if self.axis == "context" and context is not None else rows
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.query(rows), *self.key_value(source).chunk(2, -1))
        )
        bias = None if self.bias is None else self.bias.to(query.dtype)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        found = self.out(found.transpose(1, 2).flatten(2)).unflatten(0, lead)
        return x + (found.transpose(1, 2) if self.axis == "time" else found)


class FeedForward(nn.Module):
    def __init__(self, kind: str, dim: int, gated: bool) -> None:
        super().__init__()
        self.kind, self.gated = kind, gated
        inner = int(4 * dim * 2 / 3) if gated else 4 * dim
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(inner, dim)
        self.inner = nn.Linear(dim, 2 * inner if gated else inner)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        hidden: Tensor = self.inner(self.norm(x))
        if self.gated:
            hidden, gate = hidden.chunk(2, -1)
            return x + self.out(F.gelu(gate) * hidden)
        return x + self.out(F.gelu(hidden))


class Positions(nn.Module):
    """LAPA's positions: a depthwise convolution over time, height and width that does not look ahead."""

    def __init__(self, kind: str, dim: int, side: int) -> None:
        super().__init__()
        self.kind, self.side, self.filter = kind, side, nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        maps = x.unflatten(2, (self.side, self.side)).permute(0, 4, 1, 2, 3)
        found: Tensor = self.filter(F.pad(maps, (1, 1, 1, 1, 2, 0)))
        return x + found.permute(0, 2, 3, 4, 1).flatten(2, 3)


class Stack(nn.Module):
    """Layers one after another; ``only`` are those of a kind."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(str(layer.kind) for layer in self.layers))

    def forward(self, x: Tensor, context: Tensor | None = None, only: str = "") -> Tensor:
        for layer in self.layers:
            if not only or layer.kind == only:
                x = layer(x, context)
        return x


class Patches(nn.Module):
    """frames (B, T, 3, H, W) -> tokens (B, T, S, D)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch, entries = sizes.patch, 3 * sizes.patch**2
        self.embed = nn.Sequential(nn.LayerNorm(entries), nn.Linear(entries, sizes.dim), nn.LayerNorm(sizes.dim))

    def forward(self, frames: Tensor) -> Tensor:
        tokens: Tensor = self.embed(cut(frames, self.patch))
        return tokens


def cut(frames: Tensor, patch: int) -> Tensor:
    """(B, T, 3, H, W) -> (B, T, S, 3·patch²)."""
    batch, time, channels, height, width = frames.shape
    grid = frames.reshape(batch, time, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, time, -1, channels * patch**2)


class NoiseModule(nn.Module):
    """LAPA's bottleneck with :class:`lamkernels.VectorQuantize`: it asks nothing of the GPU, so a graph can hold it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.around = stock_lapa.NSVQ(**arguments)
        del self.around.codebooks
        dim, codes = arguments["embedding_dim"], arguments["num_embeddings"]
        self.vq = lk.VectorQuantize(dim, codes, update="gradient", gradient="noise")

    def forward(self, first: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        batch, around = first.shape[0], self.around
        rows = around.encode(last, batch) - around.encode(first.contiguous(), batch)
        quantized, indices, _ = self.vq(rows)
        return around.decode(quantized, batch), indices


class Lapa(nn.Module):
    """Two frames -> tokens -> attention over space, then time -> noise substitution -> the second frame's pixels."""

    def __init__(self, sizes: Sizes, bottleneck: Bottleneck, device: str) -> None:
        super().__init__()
        dim, heads, side, self.patch = sizes.dim, sizes.heads, sizes.side, sizes.patch
        self.embed = Patches(sizes)
        space: list[nn.Module] = []
        time: list[nn.Module] = []
        after: list[nn.Module] = []
        for _ in range(sizes.depth):
            space += [
                Positions("positions", dim, side),
                Attention("spatial attention", dim, heads, bias=side * side),
                FeedForward("spatial feed-forward", dim, True),
            ]
            time += [
                Positions("positions", dim, side),
                Attention("temporal attention, T = 2", dim, heads, "time"),
                FeedForward("temporal feed-forward", dim, True),
            ]
            after += [
                Positions("positions", dim, side),
                Attention("attention", dim, heads, bias=side * side),
                Attention("cross attention", dim, heads, "context"),
                FeedForward("feed-forward", dim, True),
            ]
        self.encoder, self.decoder = Stack(*space, *time), Stack(*after)
        make: dict[str, Callable[..., nn.Module]] = {
            "stock": stock_lapa.NSVQ, "fused": lapa.NSVQ, "module": NoiseModule
        }  # fmt: skip
        self.bottleneck = make[bottleneck](
            dim=dim, num_embeddings=8, embedding_dim=32, device=device, code_seq_len=4, patch_size=sizes.patch,
            image_size=sizes.image,
        )  # fmt: skip
        self.pixels = nn.Linear(dim, 3 * sizes.patch**2)

    def embedded(self, frames: Tensor) -> Tensor:
        tokens: Tensor = self.embed(frames)
        return tokens

    def quantised(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context of the decoder, and a loss of the codebook."""
        return self.bottleneck(tokens[:, 0], tokens[:, 1])[0], None

    def decoded(self, tokens: Tensor, context: Tensor, frames: Tensor) -> Tensor:
        """The loss of the reconstruction from the first frame's tokens."""
        found = self.pixels(self.decoder(tokens[:, :1].detach(), context))
        return F.mse_loss(found.float(), cut(frames[:, 1:], self.patch))


class Univla(nn.Module):
    """Features of a frozen encoder, action tokens among them -> attention over space and time -> codes -> features."""

    def __init__(self, sizes: Sizes, bottleneck: Bottleneck, device: str) -> None:
        super().__init__()
        dim, heads = sizes.dim, sizes.heads
        self.patches = Patches(sizes)
        frozen: list[nn.Module] = []
        for _ in range(sizes.frozen):
            frozen += [Attention("attention", dim, heads), FeedForward("feed-forward", dim, False)]
        self.frozen = Stack(*frozen)
        for parameter in (*self.patches.parameters(), *self.frozen.parameters()):
            parameter.requires_grad_(False)
        self.action = nn.Parameter(torch.rand(1, 1, 4, dim))
        layers: list[nn.Module] = []
        after: list[nn.Module] = []
        for _ in range(sizes.depth):
            layers += [
                Attention("spatial attention", dim, heads),
                Attention("temporal attention, T = 2", dim, heads, "time"),
                FeedForward("feed-forward", dim, False),
            ]
            after += [Attention("attention", dim, heads), FeedForward("feed-forward", dim, False)]
        self.encoder, self.decoder = Stack(*layers), Stack(*after)
        make = stock_univla.VectorQuantizer if bottleneck == "stock" else univla.VectorQuantizer
        self.bottleneck = make(num_latents=16, latent_dim=128)
        self.down, self.up, self.patch_up = nn.Linear(dim, 128), nn.Linear(128, dim), nn.Linear(dim, dim)
        self.features = nn.Linear(dim, dim)

    def embedded(self, frames: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = self.frozen(self.patches(frames))
        return torch.cat([self.action.expand(*features.shape[:2], -1, -1).to(features), features], 2)

    def quantised(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context of the decoder, and the losses of the codebook."""
        z_q, z, x, _ = self.bottleneck(self.down(tokens[:, 1, :4]).float())
        return self.up(z_q), F.mse_loss(z, x.detach()) + 0.25 * F.mse_loss(x, z.detach())

    def decoded(self, tokens: Tensor, context: Tensor, frames: Tensor) -> Tensor:
        """The loss of the second frame's features, from those of the first."""
        before, target = tokens[:, :1, 4:].detach(), tokens[:, 1:, 4:].detach()
        joined = torch.cat([context[:, None], self.patch_up(before)], 2)
        return F.mse_loss(self.features(self.decoder(joined)[:, :, 4:]).float(), target.float())


def make_model(project: str, sizes: Sizes, bottleneck: Bottleneck, device: str) -> Lapa | Univla:
    """The model of a project in training mode, the same for the same seed."""
    torch.manual_seed(0)
    kind = Lapa if project == "lapa" else Univla
    return kind(sizes, bottleneck, device).to(device).train()


def loss_of(model: Lapa | Univla, frames: Tensor) -> Tensor:
    """Frames (B, 2, 3, H, W) -> the loss ()."""
    tokens = model.embedded(frames)
    context, extra = model.quantised(model.encoder(tokens))
    loss = model.decoded(tokens, context, frames)
    return loss if extra is None else loss + extra
