"""A small latent action model of frames with the bottlenecks of :mod:`bottlenecks`, for experiments by the hundred.

The reference :class:`lamkernels.lam.LatentActionModel` sums its encoder over the picture and weighs what moves, so it
is half a remedy by itself. This one has nothing of the kind: what it encodes, its objectives decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.lam.bottlenecks import BOTTLENECKS
from lamkernels.validation import check_integer, check_option, check_positive


@dataclass(frozen=True)
class FrameLAMConfig:
    """The shape of a :class:`FrameLAM`.

    Attributes:
        size: S of the frames, pixels; a multiple of 4.
        channels: C of the frames.
        latent_dim: k.
        bottleneck: of :data:`lamkernels.lam.bottlenecks.BOTTLENECKS`.
        codebook_size: K, of the bottlenecks that have codes.
        width: channels of the first convolution; the second has twice, the layers eight times as many.
    """

    size: int = 16
    channels: int = 1
    latent_dim: int = 1
    bottleneck: str = "none"
    codebook_size: int = 8
    width: int = 8

    def __post_init__(self) -> None:
        for name in ("size", "channels", "latent_dim", "codebook_size", "width"):
            check_integer(name, getattr(self, name))
        if self.size % 4:
            raise ValueError(f"size is {self.size}; it must be a multiple of 4")
        check_option("bottleneck", self.bottleneck, tuple(BOTTLENECKS))


class Latent(NamedTuple):
    """What the encoder and the bottleneck make of a transition.

    Attributes:
        before: (B, k) float: what went into the bottleneck, normalised over the batch.
        z: (B, k) float: what came out.
        indices: (B, ...) int64: its codes; None without a codebook.
        loss: () float, of the bottleneck.
    """

    before: Tensor
    z: Tensor
    indices: Tensor | None
    loss: Tensor


class FrameLAM(nn.Module):
    """z = bottleneck(encoder(o, o' − o)), ô' = o + decoder(o, z).

    Convolutions with stride 2 encode the frame and its change, and layers without any symmetry read z from them. The
    decoder is the same with the frame alone; what it makes of frame and z goes out at a quarter of the resolution, into
    convolutions, and at the full one, so that it can move a sprite or raise a background, whichever pays.

    Args:
        config: the shape.
        mean: (C, S, S) float, in [0, 1] pixel units: taken off every frame; None takes off nothing.
        scale: what one unit of the model is, in [0, 1] pixel units. Pixels that hardly vary teach slowly: see
            :func:`lamkernels.lam.frame_training.train_frame_lam`.

    Shape:
        frame, next_frame (B, C, S, S) float, in units of the model -> the prediction, the same, and a :class:`Latent`.

    Raises:
        ValueError: the mean does not fit, or the scale is not positive.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: FrameLAMConfig, mean: Tensor | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        w, c, k, size = config.width, config.channels, config.latent_dim, config.size
        self.coarse = (2 * w, size // 4, size // 4)
        entries = 2 * w * (size // 4) ** 2
        self.encoder = convolutions(3 * c, w)
        self.head = nn.Sequential(nn.Linear(entries, 8 * w), nn.SiLU(), nn.Linear(8 * w, k))
        self.norm = nn.BatchNorm1d(k, affine=False)
        self.bottleneck = BOTTLENECKS[config.bottleneck](k, config.codebook_size)
        self.down = convolutions(c, w)
        self.mix = nn.Sequential(nn.Linear(entries + k, 8 * w), nn.SiLU(), nn.Linear(8 * w, 8 * w), nn.SiLU())
        self.field = nn.Linear(8 * w, entries)
        self.up = nn.Sequential(_double(2 * w, w), nn.SiLU(), _double(w, c))
        self.picture = nn.Linear(8 * w, c * size**2)
        check_positive("scale", scale)
        mean = torch.zeros(c, size, size) if mean is None else mean
        if mean.shape != (c, size, size):
            raise ValueError(f"mean has shape {tuple(mean.shape)}; it must be {(c, size, size)}")
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", torch.tensor(scale))

    def pixels(self, frames: Tensor) -> Tensor:
        """Frames (B, C, S, S) uint8, in units of the model, float32."""
        return (frames.to(self.mean) / 255 - self.mean) / self.scale

    def forward(self, frame: Tensor, next_frame: Tensor) -> tuple[Tensor, Latent]:
        latent = self.infer(frame, next_frame)
        return self.decode(frame, latent.z), latent

    def infer(self, frame: Tensor, next_frame: Tensor) -> Latent:
        """The latent action between two frames (B, C, S, S), in units of the model."""
        before = self.norm(self._hidden(frame, next_frame))
        z, indices, loss = self.bottleneck(before)
        return Latent(before, z, indices, loss)

    def before_bottleneck(self, frame: Tensor, next_frame: Tensor) -> Tensor:
        """What goes into the bottleneck, (B, k), in training normalised over these frames; no state changes.

        :meth:`infer` of frames that are no data, such as augmented ones, would move the moments that evaluation
        normalises with, and a codebook that is learned by moving averages.
        """
        norm = self.norm
        moments = (None, None) if self.training else (norm.running_mean, norm.running_var)
        return F.batch_norm(self._hidden(frame, next_frame), *moments, training=self.training, eps=norm.eps)

    def _hidden(self, frame: Tensor, next_frame: Tensor) -> Tensor:
        seen = torch.cat([frame, next_frame, (next_frame - frame)], 1)
        hidden: Tensor = self.head(self.encoder(seen).flatten(1))
        return hidden

    def decode(self, frame: Tensor, z: Tensor) -> Tensor:
        """The next frame (B, C, S, S) under z (B, k), in units of the model."""
        hidden = self.down(frame)
        mixed = self.mix(torch.cat([hidden.flatten(1), z], 1))
        change: Tensor = self.up(F.silu(hidden + self.field(mixed).view(-1, *self.coarse)))
        picture: Tensor = self.picture(mixed)
        return frame + change + picture.view_as(frame)


def convolutions(channels: int, width: int) -> nn.Sequential:
    """(B, channels, S, S) -> (B, 2 · width, S / 4, S / 4)."""
    first, second = nn.Conv2d(channels, width, 4, 2, 1), nn.Conv2d(width, 2 * width, 4, 2, 1)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU())


def _double(channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4 * out_channels, 3, padding=1), nn.PixelShuffle(2))
