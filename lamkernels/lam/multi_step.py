"""The endogenous subspace from a multi-step inverse model."""

from __future__ import annotations

import torch
from torch import Tensor

from lamkernels.lam.blocks import RTOL, DerivedMoments, JointMoments, regression, signed, whitening
from lamkernels.validation import check_number


def multi_step_projection(moments: JointMoments, *, rtol: float = 0.1) -> Tensor:
    """P (r, d): the rows that a linear multi-step inverse model reads the action from.

    a_t is regressed on (o_t, o_{t+h}). Given the two endogenous states, the exogenous ones say nothing about the
    action, so the coefficients annihilate them: P F = 0 in the population (Efroni et al. 2022, "Provably filtering
    exogenous distractors using multistep inverse dynamics"; Lamb et al. 2022, "Guaranteed discovery of
    control-endogenous latent states with multi-step inverse models"). On N samples P F falls like 1/√N.

    Args:
        moments: of "o", "o_ahead" and "a".
        rtol: combinations of the coefficients that move the prediction by less than this share of what the largest
            does, in standard deviations of o, are left out, in [0, 1): estimated from few rows they are noise.

    Returns:
        Orthonormal rows that span the coefficients of both observations, at most 2p of them, fp64.

    Raises:
        TypeError: rtol is not a number.
        ValueError: rtol is out of range, or no direction of the observations predicts the action.
    """
    check_number("rtol", rtol, lambda value: 0 <= value < 1, "at least 0 and below 1")
    G, effects = inverse_coefficients(moments)
    U, S, _ = torch.linalg.svd(effects, full_matrices=False)
    rank = int((S[:1] * rtol < S).sum())
    if not rank:
        raise ValueError("a cannot be predicted from o and o_ahead; there is no direction to keep")
    _, _, V = torch.linalg.svd(U[:, :rank].mT @ G, full_matrices=False)
    return signed(V)


def inverse_coefficients(moments: JointMoments) -> tuple[Tensor, Tensor]:
    """The regression of a_t on (o_t, o_{t+h}), the coefficients of the two observations one above the other.

    Args:
        moments: of "o", "o_ahead" and "a".

    Returns:
        G (2p, d), and G S^{1/2} (2p, r) with S (d, d) of rank r the mean covariance of the two observations: what the
        coefficients do to the prediction, in standard deviations of o.
    """
    mean = moments.mean["o"]
    eye, zero = torch.eye(len(mean), dtype=mean.dtype, device=mean.device), mean.new_zeros(len(mean), len(mean))
    pair = DerivedMoments(moments, {"pair": {"o": torch.cat([eye, zero]), "o_ahead": torch.cat([zero, eye])}})  # (2d,)
    H, _ = regression(pair, "a", "pair")  # (p, 2d)
    G = torch.cat(H.chunk(2, dim=1))
    S = (moments.covariance("o", "o") + moments.covariance("o_ahead", "o_ahead")) / 2
    T = whitening(S, RTOL)
    return G, G @ S @ T.mT  # T S Tᵀ = I, so S Tᵀ is a root of S
