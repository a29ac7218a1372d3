"""The endogenous subspace from a multi-step inverse model."""

from __future__ import annotations

import torch
from torch import Tensor

from lamkernels.lam.blocks import DerivedMoments, JointMoments, regression, signed
from lamkernels.validation import check_number


def multi_step_projection(moments: JointMoments, *, rtol: float = 0.1) -> Tensor:
    """P (r, d): the rows that a linear multi-step inverse model reads the action from.

    a_t is regressed on (o_t, o_{t+h}). Given the two endogenous states, the exogenous ones say nothing about the
    action, so the coefficients annihilate them: P F = 0 in the population (Efroni et al. 2022, "Provably filtering
    exogenous distractors using multistep inverse dynamics"; Lamb et al. 2022, "Guaranteed discovery of
    control-endogenous latent states with multi-step inverse models"). On N samples P F falls like 1/√N.

    Args:
        moments: of "o", "o_ahead" and "a".
        rtol: directions whose singular value is below this share of the largest are left out, in [0, 1).

    Returns:
        Orthonormal rows that span the coefficients of both observations, at most 2p of them, fp64.

    Raises:
        TypeError: rtol is not a number.
        ValueError: rtol is out of range, or no direction of the observations predicts the action.
    """
    check_number("rtol", rtol, lambda value: 0 <= value < 1, "at least 0 and below 1")
    mean = moments.mean["o"]
    eye, zero = torch.eye(len(mean), dtype=mean.dtype, device=mean.device), mean.new_zeros(len(mean), len(mean))
    pair = DerivedMoments(moments, {"pair": {"o": torch.cat([eye, zero]), "o_ahead": torch.cat([zero, eye])}})  # (2d,)
    H, _ = regression(pair, "a", "pair")  # (p, 2d)
    _, S, V = torch.linalg.svd(torch.cat(H.chunk(2, dim=1)), full_matrices=False)
    if not float(S[0]) > 0:
        raise ValueError("a cannot be predicted from o and o_ahead; there is no direction to keep")
    return signed(V[: int((rtol * S[0] < S).sum())])
