"""The linear latent action model trained by gradient descent: what the closed form is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamkernels.lam.linear import LinearLAM
from lamkernels.validation import check_integer, check_positive


def train_linear_lam(
    o: Tensor,
    o_next: Tensor,
    latent_dim: int,
    *,
    steps: int = 2000,
    full_batch_steps: int = 200,
    batch_size: int = 512,
    learning_rate: float = 0.05,
    generator: torch.Generator | None = None,
) -> LinearLAM:
    """Minimises the mean of ‖A o + B (C o + D o') − o'‖² over A, B, C and D by Adam and L-BFGS.

    First come minibatches with Adam, its learning rate falling to 0 along a cosine, then all rows with L-BFGS. All four
    start at random and all four are free: nothing of the closed form goes in, and C is not −D W afterwards. What Adam
    leaves is the noise of its minibatches, which turns z wherever two eigenvalues of the innovation are close; a
    gradient of all rows has none.

    Args:
        o: (N, d) floating point; its mean is removed and its scale divided out first.
        o_next: (N, d).
        latent_dim: k.
        steps: of Adam.
        full_batch_steps: the most that L-BFGS takes.
        batch_size: rows of a step of Adam, drawn with replacement.
        learning_rate: of Adam at the first step, in units of the largest standard deviation of an entry of o'.
        generator: on the device of o, of the start and of the batches; a new one with seed 0 by default.

    Returns:
        A model with the trained maps and means of the data. Its ``loss`` is that of the trained maps on all rows; its
        ``optimal_loss``, ``eigenvalues`` and ranks are those of the closed form on the same rows.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or a number is out of range.
    """
    for name, value in (("steps", steps), ("full_batch_steps", full_batch_steps), ("batch_size", batch_size)):
        check_integer(name, value)
    check_positive("learning_rate", learning_rate)
    model = LinearLAM(latent_dim).fit(o, o_next)
    x, y = o.detach().double() - model.o_mean, o_next.detach().double() - model.o_next_mean
    scale = float(y.square().mean(0).amax().sqrt()) or 1.0
    x, y = x / scale, y / scale
    d, device = o.shape[1], o.device
    generator = generator or torch.Generator(device).manual_seed(0)

    def start(rows: int, columns: int) -> Tensor:
        normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64, device=device)
        return (normal / math.sqrt(columns)).requires_grad_()

    A, B, C, D = start(d, d), start(d, latent_dim), start(latent_dim, d), start(latent_dim, d)

    def loss_of(u: Tensor, v: Tensor) -> Tensor:
        return (u @ A.mT + (u @ C.mT + v @ D.mT) @ B.mT - v).square().sum(1).mean()

    adam = torch.optim.Adam((A, B, C, D), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,), generator=generator, device=device)
        loss = loss_of(x[rows], y[rows])
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        schedule.step()

    lbfgs = torch.optim.LBFGS(
        (A, B, C, D), max_iter=full_batch_steps, tolerance_grad=1e-9, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    joint = torch.cat([x, y], 1)
    second_moment, identity = joint.mT @ joint / len(x), torch.eye(d, dtype=x.dtype, device=device)

    def of_all_rows() -> Tensor:
        """The same mean over all rows, whose errors are (B D − I) o' + (A + B C) o."""
        lbfgs.zero_grad()
        errors = torch.cat([A + B @ C, B @ D - identity], 1)
        loss = (errors @ second_moment * errors).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    lbfgs.step(of_all_rows)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.A, model.B, model.C, model.D = (matrix.detach() for matrix in (A, B, C, D))
        model.losses[0] = scale**2 * loss_of(x, y)
    return model
