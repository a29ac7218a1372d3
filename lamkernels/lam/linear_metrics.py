"""Measures of a latent action given the observation, from moments alone: the same for linear and nonlinear models.

The forward model sees o, so a latent action may carry any amount of it and marginal measures mean nothing: everything
here is about what is left of z, the action and the exogenous state once their linear regression on o is taken out.
A model is measured through the moments of (o, z, target): :meth:`lamkernels.lam.linear.LinearLAM.latent_moments`, or
an accumulator or :class:`lamkernels.lam.blocks.SampleMoments` of its latent actions, averaged or flattened to (N, k).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lamkernels.lam.blocks import (
    RTOL,
    ConditionalMoments,
    DerivedMoments,
    JointMoments,
    conditioned,
    regression,
    whitening,
)
from lamkernels.validation import check_weight


def partial_r2(
    moments: JointMoments,
    target: str,
    *,
    z: str = "z",
    given: str = "o",
    rtol: float = RTOL,
) -> float:
    """Share of the target's variance, after its regression on ``given``, that z explains linearly.

    tr[Σ_tz Σ_z⁺ Σ_zt] / tr Σ_t with partial covariances given o: the entries of the target count by their variance.

    Args:
        moments: of the blocks named below.
        target: what z is asked for: "eps" for exogenous leakage, "a" for action recovery.
        z: the latent action.
        given: what the forward model sees.
        rtol: variances below this share of the unconditional ones count as zero.

    Returns:
        From 0 to 1; 0 where the target has no variance of its own given o.
    """
    partial = ConditionalMoments(moments, given, rtol)
    covariance = partial.covariance(target, target)
    total = float(covariance.trace())
    if total <= rtol * float(partial.unconditional(target).trace()):
        return 0.0
    rest = ConditionalMoments(partial, z, rtol).covariance(target, target)
    return min(max(1 - float(rest.trace()) / total, 0.0), 1.0)


def exogenous_leakage(moments: JointMoments, *, z: str = "z", eps: str = "eps", o: str = "o") -> float:
    """Partial R² of the exogenous innovation ε, or of ξ', from z given o: :func:`partial_r2`, 0 is no leak."""
    return partial_r2(moments, eps, z=z, given=o)


def action_recovery(moments: JointMoments, *, z: str = "z", a: str = "a", o: str = "o") -> float:
    """Partial R² of the action from z given o: :func:`partial_r2`, 1 is complete."""
    return partial_r2(moments, a, z=z, given=o)


def probe_r2(
    train: JointMoments,
    test: JointMoments,
    target: str,
    *,
    z: str = "z",
    given: str = "o",
    l2: float = 1e-4,
    rtol: float = RTOL,
) -> float:
    """:func:`partial_r2` by a ridge probe on held-out rows, in closed form from the moments of both sets.

    Both z and the target are regressed on ``given``, and what is left of the target on what is left of z, whitened,
    with the penalty: all fitted on ``train``. The result does not change when z is mapped invertibly or o added to it.

    Args:
        train: moments that the probe is fitted on.
        test: moments of other rows.
        target: as in :func:`partial_r2`.
        z: as in :func:`partial_r2`.
        given: as in :func:`partial_r2`.
        l2: penalty on the squared weights, of whitened z, per row.
        rtol: as in :func:`partial_r2`.

    Returns:
        1 − MSE(given and z) / MSE(given) on ``test``: at most 1, below 0 where the probe is worse than none; 0 where
        the target has no variance of its own given o.

    Raises:
        TypeError: l2 is not a number.
        ValueError: l2 is negative or not finite.
    """
    check_weight("l2", l2)
    residuals = {}
    for name in (target, z):
        H, _ = regression(train, name, given, rtol)
        residuals[name] = {name: None, given: -H}
    fitted, held_out = DerivedMoments(train, residuals), DerivedMoments(test, residuals)
    T = whitening(fitted.covariance(z, z), rtol, train.covariance(z, z))
    G = fitted.covariance(target, z) @ T.mT @ T / (1 + l2)
    error = {"error": {target: None, z: -G}}
    base = mean_square(fitted, held_out, target)
    if base <= rtol * float(test.covariance(target, target).trace()):
        return 0.0
    return 1 - mean_square(DerivedMoments(fitted, error), DerivedMoments(held_out, error), "error") / base


def inconsistency(
    moments: JointMoments,
    *,
    z: str = "z",
    given: str = "o",
    endogenous: str | Sequence[str] = ("s", "s_next"),
    rtol: float = RTOL,
) -> float:
    """How much z depends on the exogenous state at one endogenous transition: E‖z₁ − z₂‖² / (2 tr Cov z).

    z₁ and z₂ are latent actions of the same (s, a, s') in front of two independent backgrounds, residualised on o and
    whitened. In closed form it is the mean, over the entries of whitened z, of the variance that is left given the
    endogenous transition.

    Args:
        moments: of the blocks named below.
        z: the latent action.
        given: the observation.
        endogenous: blocks that determine the endogenous transition.
        rtol: variances below this share of the unconditional ones count as zero.

    Returns:
        From 0 (the background does not matter) to 1 (nothing else does); 0 where z is constant given o.
    """
    partial = ConditionalMoments(moments, given, rtol)
    T = whitening(partial.covariance(z, z), rtol, partial.unconditional(z))
    if not len(T):
        return 0.0
    rest = conditioned(partial, endogenous, rtol).covariance(z, z)
    return min(max(float((T @ rest @ T.mT).trace()) / len(T), 0.0), 1.0)


def pair_inconsistency(
    moments: JointMoments,
    *,
    z: tuple[str, str] = ("z", "z_view"),
    given: tuple[str, str] = ("o", "o_view"),
    rtol: float = RTOL,
) -> float:
    """:func:`inconsistency` where the endogenous state is not known, from pairs of the same (s, a) in two backgrounds.

    Args:
        moments: of the blocks named below.
        z: latent actions of the first and of the second member of a pair, (k,) each.
        given: their observations.
        rtol: variances below this share of the unconditional ones count as zero.

    Returns:
        E‖z₁ − z₂‖² / (2 tr Cov z), each residualised on its own o, whitened with the mean covariance of the two:
        1 for unrelated latent actions (2 is possible where they are opposite); 0 where z is constant given o.
    """
    residuals = {}
    for name, o in zip(z, given, strict=True):
        H, _ = regression(moments, name, o, rtol)
        residuals[name] = {name: None, o: -H}
    left = DerivedMoments(moments, residuals)
    first, second = z
    own = (left.covariance(first, first) + left.covariance(second, second)) / 2
    whole = (moments.covariance(first, first) + moments.covariance(second, second)) / 2
    T = whitening(own, rtol, whole)
    if not len(T):
        return 0.0
    cross = left.covariance(first, second)
    difference = 2 * own - cross - cross.mT
    return max(float((T @ difference @ T.mT).trace()) / (2 * len(T)), 0.0)


def subspace_angle(first: Tensor, second: Tensor) -> float:
    """The largest principal angle between two row spaces (Björck and Golub 1973), accurate for small angles too.

    Args:
        first: (k₁, d) floating point; its rank counts, rows of zeros do not.
        second: (k₂, d). Of two spaces of different dimension the smaller one is compared with its place in the larger.

    Returns:
        Degrees, from 0 to 90; 90 where one space is empty and the other is not.

    Raises:
        ValueError: the matrices do not have two axes and one d.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"first is {tuple(first.shape)} and second {tuple(second.shape)}; they must be (k, d) with one d"
        )
    small, large = sorted((_orthonormal_rows(first), _orthonormal_rows(second)), key=len)
    if not len(small):
        return 0.0 if not len(large) else 90.0
    inside = small @ large.mT  # (k, k'), its singular values are cosines
    cosine = float(torch.linalg.svdvals(inside)[-1])
    sine = float(torch.linalg.svdvals(small - inside @ large)[0])
    return math.degrees(math.atan2(sine, cosine))


def _orthonormal_rows(matrix: Tensor) -> Tensor:
    _, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = int((RTOL * S.amax() < S).sum()) if len(S) else 0
    rows: Tensor = V[:rank]
    return rows


def mean_square(train: JointMoments, test: JointMoments, error: str) -> float:
    """E‖error‖² of a block on ``test``, with its mean on ``train`` taken off: what a fit on ``train`` leaves there."""
    offset = test.mean[error] - train.mean[error]
    return float(test.covariance(error, error).trace() + offset.square().sum())
