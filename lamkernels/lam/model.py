"""The reference latent action model: inverse dynamics, a bottleneck, a forward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.lam.objectives import relative_motion_error
from lamkernels.lam.stock import StockVectorQuantize
from lamkernels.nn import VectorQuantize
from lamkernels.processes import Processes

BOTTLENECKS = ("vq", "stock-vq", "gaussian", "none")
FORWARD_MODELS = ("unet", "conv")

CHANGE_SCALE = 8.0  # of the encoder's input: keeps its sums far above the eps of the normalisation behind them


@dataclass(frozen=True)
class LAMConfig:
    """The shape of a :class:`LatentActionModel` and of its loss.

    Attributes:
        size: S, height and width of a frame, pixels; a multiple of 16.
        channels: C of a frame.
        width: channels of the first convolution; the deeper ones have 2, 4 and 4 times as many.
        tokens: latent action tokens per transition.
        latent_dim: D of a token.
        bottleneck: "vq" (:class:`lamkernels.VectorQuantize`), "stock-vq" (the same in plain torch), "gaussian" or
            "none".
        codebook_size: K, for the VQ bottlenecks; all tokens share one codebook.
        decay: of the codebook's moving averages.
        dead_code_threshold: codes whose moving count falls below it are replaced by rows of the batch.
        commitment_weight: of the VQ commitment loss in the bottleneck's loss.
        kl_weight: of the Gaussian bottleneck's divergence.
        forward_model: "unet", or "conv": the same without skip connections.
        motion_weight: see :func:`lamkernels.lam.objectives.relative_motion_error`.
    """

    size: int = 64
    channels: int = 3
    width: int = 16
    tokens: int = 4
    latent_dim: int = 32
    bottleneck: str = "vq"
    codebook_size: int = 8
    decay: float = 0.95
    dead_code_threshold: float = 1.0
    commitment_weight: float = 0.05
    kl_weight: float = 1e-4
    forward_model: str = "unet"
    motion_weight: float = 20.0

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 16:
            raise ValueError(f"size is {self.size}; it must be a multiple of 16")
        for name in ("channels", "width", "tokens", "latent_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("commitment_weight", "kl_weight", "motion_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name, allowed in (("bottleneck", BOTTLENECKS), ("forward_model", FORWARD_MODELS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, allowed))}"
                )


class LAMOutput(NamedTuple):
    """One forward of a :class:`LatentActionModel`.

    Attributes:
        prediction: (B, C, S, S) float: the predicted next frame, in [0, 1] pixel units (not clamped).
        latent: (B, tokens, D) float: the latent action, behind the bottleneck.
        indices: (B, tokens) int64: its codes; None without a codebook.
        reconstruction_loss: () float.
        bottleneck_loss: () float, already weighted.
    """

    prediction: Tensor
    latent: Tensor
    indices: Tensor | None
    reconstruction_loss: Tensor
    bottleneck_loss: Tensor

    @property
    def loss(self) -> Tensor:
        """() float: what training minimises."""
        return self.reconstruction_loss + self.bottleneck_loss


class NoBottleneck(nn.Module):
    """x (..., D) -> x, None, 0."""

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        return x, None, x.new_zeros(())


class GaussianBottleneck(nn.Module):
    """A diagonal Gaussian with a standard normal prior (Kingma and Welling 2014).

    x (..., D) -> latent (..., D), None, weight · KL, the divergence summed over D and averaged over the rest. In
    training the latent is a sample, in evaluation the mean. Processes with one state of torch's generator draw the
    noise that one process would draw for the joined batch.
    """

    def __init__(self, dim: int, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.moments = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        mean, log_variance = self.moments(x).chunk(2, dim=-1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        latent = mean + self._noise(mean) * (0.5 * log_variance).exp() if self.training else mean
        return latent, None, self.weight * divergence

    def _noise(self, mean: Tensor) -> Tensor:
        processes, rows = Processes(), len(mean)
        noise = torch.randn((processes.size * rows, *mean.shape[1:]), dtype=mean.dtype, device=mean.device)
        return noise[processes.rank * rows :][:rows]


class JoinedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of (B, F) over the batches of all processes, which are of one length, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        processes = Processes()
        if not self.training or processes.size == 1:
            return super().forward(x)
        wide, count = x.double(), processes.size * len(x)
        mean, square = (processes.total(torch.stack([wide.sum(0), wide.square().sum(0)])) / count).unbind()
        variance = square - mean.square()
        with torch.no_grad():
            for kept, new in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1))):
                kept.lerp_(new.to(kept), self.momentum)  # type: ignore[union-attr, arg-type]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        normalised: Tensor = (wide - mean) * (variance + self.eps).rsqrt()
        return normalised.to(x)


class InverseDynamics(nn.Module):
    """Two frames (B, C, S, S) -> x (B, tokens, D): strided convolutions over the change, then the sum over the picture.

    The forward model sees the frame itself, so the encoder is left with what moved and which way, and not where: an
    encoder that may tell places apart spends its few codes on them. Two normalisations without weights end it. The one
    over D takes the size away: convolutions without bias and ReLU are homogeneous, and one frame in which the score
    changes must not dwarf the rest. The one over (B,) makes every entry of x vary with the transition, so that no token
    sits on one code (Łańcucki et al. 2020, "Robust training of vector quantized bottleneck models").
    """

    def __init__(self, config: LAMConfig) -> None:
        super().__init__()
        w = config.width
        self.convolutions = nn.ModuleList(
            (
                nn.Conv2d(config.channels, 2 * w, 8, stride=4, padding=2, bias=False),
                nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1, bias=False),
                nn.Conv2d(4 * w, 4 * w, 4, stride=2, padding=1, bias=False),
            )
        )
        self.shape = (config.tokens, config.latent_dim)
        latent = config.tokens * config.latent_dim
        self.head = nn.Linear(4 * w, latent, bias=False)
        self.norm = JoinedBatchNorm(latent, affine=False)

    def forward(self, frame: Tensor, next_frame: Tensor) -> Tensor:
        hidden = CHANGE_SCALE * (next_frame - frame)
        for convolution in self.convolutions:
            hidden = F.relu(convolution(hidden))
        tokens = F.layer_norm(self.head(hidden.sum((2, 3))).view(-1, *self.shape), self.shape[1:])
        x: Tensor = self.norm(tokens.flatten(1))
        return x.view(tokens.shape)


class ForwardModel(nn.Module):
    """A frame (B, C, S, S) and a latent action (B, tokens, D) -> the change of the frame (B, C, S, S).

    A convolutional encoder and decoder; the latent scales and shifts the channels of the innermost layer and of every
    decoder stage (FiLM). ``skips`` makes it a U-Net, with skips that add. The last layer starts at zero, so training
    starts from "nothing moves".
    """

    def __init__(self, config: LAMConfig, *, skips: bool) -> None:
        super().__init__()
        w, latent = config.width, config.tokens * config.latent_dim
        self.skips = skips
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in ((config.channels, w), (w, 2 * w), (2 * w, 4 * w))
        )
        self.middle = nn.Conv2d(4 * w, 4 * w, 3, padding=1)
        self.up = nn.ModuleList(_double(a, b, kernel=1) for a, b in ((4 * w, 2 * w), (2 * w, w)))
        self.films = nn.ModuleList(nn.Linear(latent, 2 * width) for width in (4 * w, 2 * w, w))
        self.last = _double(w, config.channels, kernel=3)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, frame: Tensor, latent: Tensor) -> Tensor:
        z = latent.flatten(1)
        hidden, kept = frame, []
        for down in self.down:
            hidden = F.silu(down(hidden))
            kept.append(hidden)
        hidden = F.silu(_film(self.middle(hidden), self.films[0](z)))
        for up, film, skip in zip(self.up, self.films[1:], kept[-2::-1], strict=True):
            hidden = F.silu(_film(up(hidden), film(z)))
            if self.skips:
                hidden = hidden + skip
        change: Tensor = self.last(hidden)
        return change


def _double(channels: int, out_channels: int, kernel: int) -> nn.Module:
    """(B, channels, S, S) -> (B, out_channels, 2S, 2S), with a backward that is deterministic on GPUs too."""
    return nn.Sequential(nn.Conv2d(channels, 4 * out_channels, kernel, padding=kernel // 2), nn.PixelShuffle(2))


def _film(hidden: Tensor, scale_shift: Tensor) -> Tensor:
    scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
    return hidden * (1 + scale) + shift


def make_bottleneck(config: LAMConfig) -> nn.Module:
    """The bottleneck named by ``config``: any module with ``latent, indices or None, loss = bottleneck(x)`` will do."""
    if config.bottleneck == "none":
        return NoBottleneck()
    if config.bottleneck == "gaussian":
        return GaussianBottleneck(config.latent_dim, config.kl_weight)
    kind = VectorQuantize if config.bottleneck == "vq" else StockVectorQuantize
    return kind(
        config.latent_dim,
        config.codebook_size,
        decay=config.decay,
        init="kmeans",
        dead_code_threshold=config.dead_code_threshold,
        commitment_weight=config.commitment_weight,
    )


class LatentActionModel(nn.Module):
    """z = bottleneck(inverse dynamics(o, o')), ô' = o + forward model(o, z); the loss compares ô' with o'.

    Args:
        config: shape and loss.
        bottleneck: replaces the one named by ``config``; ``latent, indices or None, loss = bottleneck(x)`` for
            x (B, tokens, D) float.

    Shape:
        frame, next_frame (B, C, S, S), uint8 in [0, 255] or floating point in [0, 1] -> :class:`LAMOutput`.

    Raises:
        ValueError: a frame does not have the shape that ``config`` names.
    """

    def __init__(self, config: LAMConfig | None = None, bottleneck: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config or LAMConfig()
        self.inverse_dynamics = InverseDynamics(self.config)
        self.forward_model = ForwardModel(self.config, skips=self.config.forward_model == "unet")
        self.bottleneck = make_bottleneck(self.config) if bottleneck is None else bottleneck

    def forward(self, frame: Tensor, next_frame: Tensor) -> LAMOutput:
        frame, next_frame = self._pixels("frame", frame), self._pixels("next_frame", next_frame)
        latent, indices, bottleneck_loss = self.bottleneck(self.inverse_dynamics(frame, next_frame))
        prediction = frame + self.forward_model(frame, latent)
        predicted, target, source = (
            # no mean over the rows: its scale is that of the joined batch
            Processes().joined(pixels) if self.training else pixels
            for pixels in (prediction, next_frame, frame)
        )
        loss = relative_motion_error(predicted, target, source, self.config.motion_weight)
        return LAMOutput(prediction, latent, indices, loss, bottleneck_loss)

    def encode(self, frame: Tensor, next_frame: Tensor) -> tuple[Tensor, Tensor | None]:
        """The latent action (B, tokens, D) between two frames and its codes (B, tokens) int64, if it has any."""
        x = self.inverse_dynamics(self._pixels("frame", frame), self._pixels("next_frame", next_frame))
        latent, indices, _ = self.bottleneck(x)
        return latent, indices

    def predict(self, frame: Tensor, latent: Tensor) -> Tensor:
        """The next frame (B, C, S, S) under a latent action (B, tokens, D), in [0, 1] pixel units (not clamped)."""
        frame = self._pixels("frame", frame)
        prediction: Tensor = frame + self.forward_model(frame, latent)
        return prediction

    def _pixels(self, name: str, frame: Tensor) -> Tensor:
        wanted = (self.config.channels, self.config.size, self.config.size)
        if frame.ndim != 4 or frame.shape[1:] != wanted:
            raise ValueError(f"{name} has shape {tuple(frame.shape)}; it must be (B, {', '.join(map(str, wanted))})")
        dtype = self.inverse_dynamics.head.weight.dtype
        return frame.to(dtype) / 255 if frame.dtype == torch.uint8 else frame
