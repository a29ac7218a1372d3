"""A nonlinear latent action model of vectors: networks where the linear one has matrices, and a bottleneck between."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.lam.bottlenecks import BOTTLENECKS
from lamkernels.validation import check_integer, check_option, check_positive, check_weight


class VectorLAM(nn.Module):
    """z = bottleneck(encoder(o, o')), ô' = A c + decoder(c, z), with c = o unless a remedy names another context.

    Encoder and decoder are perceptrons with two hidden layers. What goes into the bottleneck is normalised over the
    batch, without weights, so that a codebook and a divergence find the same scale whatever the noise.

    Args:
        dim: d, of o and o'.
        latent_dim: k.
        bottleneck: of :data:`lamkernels.lam.bottlenecks.BOTTLENECKS`.
        codebook_size: K, codes; FSQ has the next grid of k columns, a residual quantiser √K codes for each stage.
        hidden: width of the hidden layers.
        target_dim: of what is predicted; d by default.
        auxiliary_dim: p, of what a linear map of (c, z) predicts besides, such as the action; 0 for none.

    Shape:
        o, o_next (N, d), context (N, d) or None -> prediction (N, target_dim), z (N, k), auxiliary (N, p), loss of the
        bottleneck ().

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, or the bottleneck is unknown.
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        bottleneck: str = "vq",
        *,
        codebook_size: int = 64,
        hidden: int = 64,
        target_dim: int | None = None,
        auxiliary_dim: int = 0,
    ) -> None:
        super().__init__()
        target_dim = dim if target_dim is None else target_dim
        sizes = {"dim": dim, "latent_dim": latent_dim, "codebook_size": codebook_size, "hidden": hidden}
        for name, size in (*sizes.items(), ("target_dim", target_dim)):
            check_integer(name, size)
        check_option("bottleneck", bottleneck, tuple(BOTTLENECKS))
        self.encoder = _perceptron(2 * dim, hidden, latent_dim)
        self.norm = nn.BatchNorm1d(latent_dim, affine=False)
        self.bottleneck = BOTTLENECKS[bottleneck](latent_dim, codebook_size)
        self.skip = nn.Linear(dim, target_dim)
        self.decoder = _perceptron(dim + latent_dim, hidden, target_dim)
        self.auxiliary = nn.Linear(dim + latent_dim, auxiliary_dim) if auxiliary_dim else None

    def forward(
        self, o: Tensor, o_next: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        context = o if context is None else context
        z, loss = self._latent(o, o_next)
        known = torch.cat([context, z], 1)
        auxiliary = known[:, :0] if self.auxiliary is None else self.auxiliary(known)
        return self.skip(context) + self.decoder(known), z, auxiliary, loss

    @torch.no_grad()
    def encode(self, o: Tensor, o_next: Tensor) -> Tensor:
        """The latent actions (N, k), in evaluation mode."""
        training = self.training
        self.eval()
        z, _ = self._latent(o, o_next)
        self.train(training)
        return z

    def _latent(self, o: Tensor, o_next: Tensor) -> tuple[Tensor, Tensor]:
        z, _, loss = self.bottleneck(self.norm(self.encoder(torch.cat([o, o_next], 1))))
        return z, loss


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Module:
    layers = (nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
    return nn.Sequential(*layers)


class Transitions(NamedTuple):
    """What a :class:`VectorLAM` is trained on, rows of one length N, in one floating point dtype.

    Attributes:
        o: (N, d).
        o_next: (N, d).
        target: (N, target_dim), what is predicted; ``o_next`` unless a remedy names another.
        context: (N, d), what the decoder sees; None means o.
        auxiliary: (N, p), what is predicted besides, or None.
        labelled: how many rows, the first ones, have it.
    """

    o: Tensor
    o_next: Tensor
    target: Tensor
    context: Tensor | None = None
    auxiliary: Tensor | None = None
    labelled: int = 0


def train_vector_lam(
    data: Transitions,
    latent_dim: int,
    bottleneck: str = "vq",
    *,
    auxiliary_weight: float = 0.0,
    codebook_size: int = 64,
    hidden: int = 64,
    steps: int = 2000,
    batch_size: int = 512,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> VectorLAM:
    """Minimises E‖ô' − o'‖² + λ·E[labelled · ‖â − a‖²] and the bottleneck's loss with Adam on minibatches.

    The learning rate falls to 0 along a cosine. With one thread the same seed gives the same bits.

    Args:
        data: rows of mean about 0 and scale about 1.
        latent_dim: k.
        bottleneck: as for :class:`VectorLAM`, as are ``codebook_size`` and ``hidden``.
        auxiliary_weight: λ ≥ 0.
        codebook_size: K.
        hidden: width.
        steps: of the optimiser.
        batch_size: rows of a step, drawn with replacement.
        learning_rate: at the first step.
        seed: of the start, the batches and the bottleneck.

    Returns:
        The model, in training mode.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or the bottleneck is unknown.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        check_integer(name, value)
    check_positive("learning_rate", learning_rate)
    check_weight("auxiliary_weight", auxiliary_weight)
    rows, dim = data.o.shape
    auxiliary_dim = 0 if data.auxiliary is None else data.auxiliary.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VectorLAM(
            dim, latent_dim, bottleneck, codebook_size=codebook_size, hidden=hidden, target_dim=data.target.shape[1],
            auxiliary_dim=auxiliary_dim,
        ).to(data.o)  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = torch.randint(rows, (batch_size,))
            context = None if data.context is None else data.context[chosen]
            prediction, _, found, loss = model(data.o[chosen], data.o_next[chosen], context)
            loss = loss + F.mse_loss(prediction, data.target[chosen]) * data.target.shape[1]
            if data.auxiliary is not None:
                known = (chosen < data.labelled).to(found)[:, None]
                error = (found - data.auxiliary[chosen]).square() * known
                loss = loss + auxiliary_weight * error.sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model
