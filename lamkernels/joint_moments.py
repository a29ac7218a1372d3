"""Co-moments of rows: weighted means and centred scatter matrices, in one pass and in fp64."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lamkernels.backend import load_kernel, resolve
from lamkernels.eager import is_plain
from lamkernels.ops.covariance.op import covariance as _covariance
from lamkernels.validation import (
    BACKENDS,
    FLOATS,
    Backend,
    check_float,
    check_integer,
    check_option,
    refuse_tangents,
)

MomentsPrecision = Literal["default", "exact"]
PRECISIONS = get_args(MomentsPrecision)


class Moments(NamedTuple):
    """What :func:`moments` returns, all fp64; mean_y, xy and yy are None without a second set of rows.

    Attributes:
        weight: (): W, the sum of the weights of the pairs that are in.
        mean_x: (D,): x̄ = Σ w x / W.
        mean_y: (E,): ȳ = Σ w y / W.
        xx: (D, D): Σ w (x − x̄)(x − x̄)ᵀ, symmetric to the last bit.
        xy: (D, E): Σ w (x − x̄)(y − ȳ)ᵀ.
        yy: (E, E): Σ w (y − ȳ)(y − ȳ)ᵀ, symmetric to the last bit.
    """

    weight: Tensor
    mean_x: Tensor
    mean_y: Tensor | None
    xx: Tensor
    xy: Tensor | None
    yy: Tensor | None


def moments(
    x: Tensor,
    y: Tensor | None = None,
    *,
    lag: int | None = None,
    weights: Tensor | None = None,
    precision: MomentsPrecision = "default",
    backend: Backend = "auto",
) -> Moments:
    """Means and centred scatters of rows, of pairs of rows, or of the rows of a sequence and those ``lag`` later.

    A covariance is a scatter over W, or over W − 1 for counts. Rows are shifted by a provisional mean, multiplied in
    fp32 inside small blocks and added up in fp64; the shift is then taken out as in Chan, Golub and LeVeque (1983), so
    that an offset of the data costs no accuracy. Two runs on one device give the same bits.

    A pair is in where its weight is positive and every entry of its rows is finite. The others are in nothing,
    whatever they hold. With no pair in, all results are 0.

    Args:
        x: (N, D); float32, float16, bfloat16 or float64, any strides.
        y: (N, E) in the dtype of x, the other rows of the pairs.
        lag: h ≥ 1, in place of y: the pairs are (x_t, x_{t+h}), N − h of them. Rows are shared, not copied; yy is xx
            but for the rows that are in pairs of different weight.
        weights: (N,), with a lag (N − h,): bool or floating, not negative; None means that all are 1.
        precision: "default", relative Frobenius error about 1e-7 on a CPU and 1e-6 on a GPU for continuous data and at
            most 2⁻¹⁸ for any; or "exact", fp64 products.
            float64 rows are multiplied in fp64 either way.
        backend: as for :func:`lamkernels.nearest_code`.

    Returns:
        :class:`Moments`, differentiable in x, y and weights; the gradient is zero for a pair that is out.

    Raises:
        TypeError: an argument is not a tensor of a supported dtype, or lag not an int.
        ValueError: a shape, device, weight or option does not fit; the message names it and what is allowed.
        RuntimeError: the backend asked for cannot run here.
    """
    _check_rows("x", x)
    check_option("precision", precision, PRECISIONS)
    check_option("backend", backend, BACKENDS)
    steps = 0
    if lag is not None:
        check_integer("lag", lag)
        if y is not None:
            raise ValueError(f"y and lag={lag} are both given; with a lag the second rows are those of x")
        steps = lag
    if y is not None:
        _check_second(x, y)
    if weights is not None:
        _check_weights(weights, x, max(x.shape[0] - steps, 0))
    refuse_tangents(*(tensor for tensor in (x, y, weights) if tensor is not None))
    outputs = _covariance(
        x[None],
        None if y is None else y[None],
        None if weights is None else weights.double()[None],
        steps,
        precision,
        backend,
    )
    weight, mean_x, mean_y, xx, xy, yy = (output.squeeze(0) for output in outputs)
    if y is None and lag is None:
        return Moments(weight, mean_x, None, xx, None, None)
    return Moments(weight, mean_x, mean_y, xx, xy, yy)


def off_diagonal_covariance_loss(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The covariance loss of VICReg (Bardes et al. 2022, equation 4): c = 1/D Σ_{i≠j} C_ij², C = Σ(x−x̄)(x−x̄)ᵀ/(N−1).

    It keeps the entries of a latent action from carrying the same information. A row that is not finite is left out,
    and N counts the rows that are in; where these are fewer than two, the loss is 0.

    Args:
        x: (N, D), N at least 2; float32, float16, bfloat16 or float64, any strides.
        backend: as for :func:`lamkernels.nearest_code`.

    Returns:
        () float32, float64 for float64 x. Differentiable.

    Raises:
        TypeError: x is not a tensor of a supported dtype.
        ValueError: x is not (N, D) with N ≥ 2 and D ≥ 1, or the backend is unknown.
        RuntimeError: the backend asked for cannot run here.
    """
    _check_rows("x", x)
    if x.shape[0] < 2:
        raise ValueError(f"x has {x.shape[0]} rows; a covariance needs at least 2")
    check_option("backend", backend, BACKENDS)
    if is_plain(x, device=x.device.type) and (chosen := resolve(backend, x.device.type)) in ("numba", "triton"):
        loss: Tensor = _OffDiagonalLoss.apply(x, chosen)  # type: ignore[no-untyped-call]
        return loss
    weight, _, _, xx, _, _ = moments(x, backend=backend)
    return _off_diagonal(weight, xx)[0].to(_loss_dtype(x))


def _off_diagonal(weight: Tensor, xx: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and what it is the sum of squares of, but for 2/D: twice the upper triangle, not all less the diagonal.

    The squares of that can be much larger than the rest.
    """
    above = xx.triu(1) / (weight - 1).clamp(min=1)
    return 2 * above.square().sum() / xx.shape[1], above


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _OffDiagonalLoss(torch.autograd.Function):
    """The loss of plain rows without the dispatcher, and its gradient (x − x̄) · 4/D · C_off / (W − 1).

    On a GPU nothing waits for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Backend) -> Tensor:
        kernel = load_kernel("covariance", "covariance", backend, x.device)
        weight, mean, _, xx, _, _ = (out.squeeze(0) for out in kernel(x.detach()[None], None, None, 0, "default"))
        loss, above = _off_diagonal(weight, xx)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, mean, above, weight)
            ctx.backend = backend
        return loss.to(_loss_dtype(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, mean, above, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is differentiated again
            total, _, _, xx, _, _ = moments(x, backend=ctx.backend)
            loss = _off_diagonal(total, xx)[0].to(grad)
            return torch.autograd.grad(loss, x, grad, create_graph=True)[0], None
        computed = _loss_dtype(x)
        near = mean.to(computed)
        scale = 4 * grad.double() / (len(mean) * (weight - 1).clamp(min=1))
        matrix = (above + above.mT) * scale
        rest = (matrix @ (near.double() - mean)).to(computed)  # what rounding the mean leaves
        with torch.autocast(x.device.type, enabled=False):
            gradient = torch.addmm(rest, x.to(computed) - near, matrix.to(computed))
        if x.is_cuda or float(weight) < len(x):
            gradient.masked_fill_(~x.isfinite().all(1, keepdim=True), 0.0)
        return gradient.type_as(x), None


def _check_rows(name: str, rows: Tensor) -> None:
    check_float(name, rows)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; it must be (N, D) with D at least 1")


def _check_second(x: Tensor, y: Tensor) -> None:
    _check_rows("y", y)
    if y.dtype != x.dtype:
        raise TypeError(f"y is {y.dtype} and x is {x.dtype}; they must have one dtype")
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y has {y.shape[0]} rows and x has {x.shape[0]}; they must be equal")
    if y.device != x.device:
        raise ValueError(f"y is on {y.device} and x on {x.device}; they must be on one device")


def _check_weights(weights: Tensor, x: Tensor, pairs: int) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is a {type(weights).__name__}; it must be a torch.Tensor")
    if weights.dtype not in (torch.bool, *FLOATS):
        raise TypeError(f"weights is {weights.dtype}; it must be bool, float32, float16, bfloat16 or float64")
    if weights.shape != (pairs,):
        raise ValueError(f"weights has shape {tuple(weights.shape)}; it must be ({pairs},), one weight a pair")
    if weights.device != x.device:
        raise ValueError(f"weights is on {weights.device} and x on {x.device}; they must be on one device")
    # values are looked at where that costs no synchronisation; elsewhere a weight that is no weight counts as 0
    if weights.device.type == "cpu" and not torch.compiler.is_compiling() and pairs and weights.dtype != torch.bool:
        try:
            low, high = (float(value) for value in torch.aminmax(weights.detach()))
        except RuntimeError:  # under vmap there are no values to look at
            return
        if not (low >= 0 and high < torch.inf):
            raise ValueError(f"weights range from {low} to {high}; they must be at least 0 and finite")
