"""What a fitted linear latent action model says about its data: one dictionary of numbers, and its text."""

from __future__ import annotations

from typing import Any

import torch

from lamkernels.covariance import Covariance
from lamkernels.lam.blocks import ConditionalMoments, DerivedMoments, JointMoments
from lamkernels.lam.linear import LinearLAM
from lamkernels.lam.linear_metrics import action_recovery, mean_square, partial_r2, probe_r2


def measure(model: LinearLAM, fitted: Covariance, held_out: Covariance) -> dict[str, Any]:
    """The numbers of a fit. Losses are E‖ô' − o'‖² in squared units of o, measures of actions are given o.

    Args:
        model: fitted on ``fitted``.
        fitted: moments of the pairs of blocks "o" and perhaps "a", with a lag.
        held_out: the same of other pairs, perhaps of none.

    Returns:
        JSON: "pairs" (fitted, held out); "loss" of the "fit", its lower bound "optimal", "held_out" (None without such
        pairs), "without_latent" (the same prediction with z at its mean) and "copy" (o' = o); "ranks"; "eigenvalues"
        that the latent dimensions explain; "actions", None where there are none:
        "recovery" (share of the action that z explains), the same "held_out" by a ridge probe, "unexplained_latent"
        (share of z that the action does not explain: what leaks is part of it), and that "by_dimension".
    """
    on_fitted, on_held_out = (DerivedMoments(moments, _errors(model)) for moments in (fitted, held_out))
    losses = {
        "fit": model.loss,
        "optimal": model.optimal_loss,
        "held_out": mean_square(on_fitted, on_held_out, "error") if held_out.count > 1 else None,
        "without_latent": float(on_fitted.covariance("error_without", "error_without").trace()),
        "copy": _copy_loss(fitted),
    }
    ranks = {
        "observation": model.observation_rank,
        "innovation": model.innovation_rank,
        "latent": model.latent_rank,
        "effective": model.effective_rank,
    }
    actions = None
    if "a" in fitted.mean:
        other = model.latent_moments(held_out) if held_out.count > 1 else None
        actions = told_of_actions(model.latent_moments(fitted), other)
    return {
        "pairs": {"fitted": fitted.count, "held_out": held_out.count},
        "loss": losses,
        "ranks": ranks,
        "eigenvalues": model.eigenvalues.tolist(),
        "actions": actions,
    }


def _errors(model: LinearLAM) -> dict[str, dict[str, torch.Tensor | None]]:
    """ô' − o' as linear maps of o' and o: of the fit, and with z at its mean."""
    identity = torch.eye(len(model.o_next_mean), dtype=model.D.dtype, device=model.D.device)
    return {
        "error": {"o_next": model.B @ model.D - identity, "o": model.A + model.B @ model.C},
        "error_without": {"o_next": -identity, "o": model.A},
    }


def _copy_loss(moments: Covariance) -> float:
    change = DerivedMoments(moments, {"change": {"o_next": None, "o": -torch.eye(len(moments.mean["o"])).double()}})
    return float(change.covariance("change", "change").trace() + change.mean["change"].square().sum())


def told_of_actions(fitted: JointMoments, held_out: JointMoments | None) -> dict[str, Any]:
    """What latent actions say about actions: "actions" of :func:`measure`.

    Args:
        fitted: moments of blocks "o", "z" and "a".
        held_out: the same of other pairs, for the probe; None where there are none.
    """
    given_o = ConditionalMoments(fitted, "o")
    whole, rest = (m.covariance("z", "z").diagonal() for m in (given_o, ConditionalMoments(given_o, "a")))
    used = whole > 0
    return {
        "recovery": action_recovery(fitted),
        "held_out": None if held_out is None else probe_r2(fitted, held_out, "a"),
        "unexplained_latent": 1 - partial_r2(fitted, "z", z="a"),
        "by_dimension": torch.where(used, (rest / whole).clamp(0, 1), 0.0).tolist(),
    }


def summary(results: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    pairs, loss, ranks, actions = (results[name] for name in ("pairs", "loss", "ranks", "actions"))
    lines = [
        f"{pairs['fitted']} pairs fitted, {pairs['held_out']} held out, {results['seconds']:.1f} s",
        f"loss {loss['fit']:.5g}, optimum {loss['optimal']:.5g}"
        + ("" if loss["held_out"] is None else f", held out {loss['held_out']:.5g}")
        + f"; without z {loss['without_latent']:.5g}, o' = o {loss['copy']:.5g}",
        f"{ranks['latent']} latent dimensions in use of {results['config']['latent_dim']}; "
        f"the innovation has rank {ranks['innovation']}, effectively {ranks['effective']:.1f}",
    ]
    if actions is None:
        lines.append("no actions: what the latent actions say cannot be measured")
    else:
        held_out = "" if actions["held_out"] is None else f" (held out {actions['held_out']:.3f})"
        lines += [
            f"action recovery {actions['recovery']:.3f}{held_out}: share of the action that z explains, given o",
            f"{actions['unexplained_latent']:.3f} of z is not explained by the action: exogenous leakage is in there",
        ]
    lines += [f"skipped {source}: {reason}" for source, reason in results["skipped"]]
    return "\n".join(lines)
