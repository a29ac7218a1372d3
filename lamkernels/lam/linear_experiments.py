"""The experiments on the linear latent action model: rows of numbers from controls alone, no files, no figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lamkernels.lam.blocks import JointMoments, SampleMoments
from lamkernels.lam.linear import LinearLAM
from lamkernels.lam.linear_metrics import (
    action_recovery,
    exogenous_leakage,
    inconsistency,
    probe_r2,
    subspace_angle,
)
from lamkernels.lam.linear_sgd import train_linear_lam
from lamkernels.lam.multi_step import inverse_coefficients, multi_step_projection
from lamkernels.lam.worlds import World, make_world

Row = dict[str, Any]
BLOCKS = ("o", "o_next", "o_view", "o_next_view", "o_ahead", "a", "eps", "flow", "s", "s_next")


@dataclass(frozen=True)
class Controls:
    """Everything that a figure depends on; sweeps are tuples of all values.

    Attributes:
        endogenous: m, entries of s.
        exogenous: n, entries of ξ.
        actions: p.
        condition: of [E F].
        latent_dim: k.
        action_variance: of each entry of a; the eigenvalues of Σ_q, as B_s has orthonormal columns.
        eps_variance: σ_ε², the largest eigenvalue of Σ_ε.
        eps_spectrum: of Σ_ε, as shares of σ_ε².
        action_weight: λρ of action supervision.
        label_share: ρ.
        flow_weight: λ of the flow.
        flow_noise: standard deviation of the flow's noise.
        through: α of the representation I − (1 − α) F F⁺, so that ‖P F‖ = α ‖F‖.
        view_correlation: of the backgrounds of two views.
        horizon: h, steps between the two observations of the inverse model.
        pairs: labelled pairs that the inverse model is fitted on.
        truncation: relative singular value at which its coefficients are truncated.
        coupling: c, correlation of ε with a.
        samples: transitions to fit on, and as many to probe on.
        sgd_steps: of gradient descent on the same transitions.
        sgd_batch: transitions of a step.
        sgd_learning_rate: at the first step.
        sampled_every: samples are drawn, fitted and trained on at every so many values of the sweep.
        repeats: seeds that are averaged where the inverse model is fitted on few pairs.
        seed: of the world, of the samples and of gradient descent.
    """

    endogenous: int = 3
    exogenous: int = 3
    actions: int = 3
    condition: float = 1.0
    latent_dim: tuple[int, ...] = (3,)
    action_variance: tuple[float, ...] = (1.0, 1.0, 1.0)
    eps_variance: tuple[float, ...] = (4.0,)
    eps_spectrum: tuple[float, ...] = (1.0, 1.0, 1.0)
    action_weight: tuple[float, ...] = ()
    label_share: float = 1.0
    flow_weight: tuple[float, ...] = ()
    flow_noise: float = 0.0
    through: tuple[float, ...] = ()
    view_correlation: tuple[float, ...] = (0.0,)
    horizon: int = 1
    pairs: tuple[int, ...] = ()
    truncation: float = 0.1
    coupling: tuple[float, ...] = (0.0,)
    samples: int = 20_000
    sgd_steps: int = 2000
    sgd_batch: int = 512
    sgd_learning_rate: float = 0.05
    sampled_every: int = 3
    repeats: int = 1
    seed: int = 0

    def world(self, **changes: Any) -> World:
        """The world of one point of a sweep; the first value of every other sweep."""
        options = {"view_correlation": self.view_correlation[0], "coupling": self.coupling[0], **changes}
        variance = options.pop("eps_variance", self.eps_variance[0])
        return make_world(
            endogenous=self.endogenous,
            exogenous=self.exogenous,
            actions=self.actions,
            condition=self.condition,
            action_variance=torch.tensor(self.action_variance, dtype=torch.float64),
            eps_variance=variance * torch.tensor(self.eps_spectrum, dtype=torch.float64),
            flow_noise=self.flow_noise,
            horizon=self.horizon,
            seed=self.seed,
            **options,
        )

    def quick(self) -> Controls:
        """Fewer points, samples and steps: seconds instead of a minute."""
        sweeps = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), tuple)}
        kept = ("action_variance", "eps_spectrum", "latent_dim")
        thin: dict[str, Any] = {n: sweep[:: max(1, len(sweep) // 8)] for n, sweep in sweeps.items() if n not in kept}
        return replace(self, **thin, samples=2000, sgd_steps=300, repeats=min(self.repeats, 2))


def _linear(start: float, stop: float, count: int) -> tuple[float, ...]:
    return tuple(round(start + i * (stop - start) / (count - 1), 12) for i in range(count))


def _logarithmic(start: float, stop: float, count: int) -> tuple[float, ...]:
    return tuple(round(math.exp(v), 12) for v in _linear(math.log(start), math.log(stop), count))


CONTROLS = {
    # the spectrum of the noise is spread: among equal eigenvalues gradient descent has nothing to choose by
    "noise": Controls(
        action_variance=(2.0, 1.0, 0.5),
        eps_variance=_logarithmic(0.05, 8.0, 81),
        eps_spectrum=(1.0, 0.7, 0.5),
        sampled_every=5,
    ),
    "capacity": Controls(
        exogenous=5,
        latent_dim=tuple(range(1, 9)),
        action_variance=(2.0, 1.0, 0.5),
        eps_variance=(0.7,),
        eps_spectrum=(1.0, 0.95, 0.9, 0.85, 0.8),
        action_weight=(100.0,),
        sampled_every=1,
    ),
    "remedies": Controls(  # an even number of values keeps sweeps off the thresholds, where ties are broken at random
        action_weight=_linear(0.0, 6.0, 40),
        label_share=0.5,
        flow_weight=_linear(0.0, 6.0, 40),
        flow_noise=0.5,
        through=_linear(0.0, 1.0, 40),
        view_correlation=_linear(0.0, 1.0, 40),
        horizon=2,
        pairs=(30, 56, 100, 180, 300, 560, 1000, 1800, 3000, 5600, 10_000),
        repeats=20,
    ),
    "dependence": Controls(
        eps_variance=(0.5, 2.0), action_weight=(100.0,), coupling=_linear(0.0, 1.0, 41), sampled_every=5
    ),
}


class Data:
    """A world, its exact moments, and, drawn when they are first used, a sample to fit on and one to probe on."""

    def __init__(self, controls: Controls, **changes: Any) -> None:
        self.controls = controls
        self.world = controls.world(**changes)
        self.population = self.world.population()

    @cached_property
    def samples(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows of all blocks, to fit on and to probe on."""
        generator = torch.Generator().manual_seed(self.controls.seed)
        first, second = (self.world.sample(self.controls.samples, generator) for _ in range(2))
        return first, second

    @cached_property
    def moments(self) -> tuple[SampleMoments, SampleMoments, SampleMoments]:
        """Of the rows to fit on, of those among them with a label, and of the rows to probe on."""
        rows, held_out = self.samples
        known = round(self.controls.label_share * self.controls.samples)  # rows are independent: the first will do
        labelled = {name: block[:known] for name, block in rows.items()}
        fit, labels, probe = (SampleMoments(**{b: r[b] for b in BLOCKS}) for r in (rows, labelled, held_out))
        return fit, labels, probe

    def closed_forms(self, k: int, *, sampled: bool = True, **options: Any) -> list[Row]:
        """The closed form on the population and, with ``sampled``, on the sample with a probe on the other one."""
        share = self.controls.label_share
        exact = LinearLAM(k, **options).fit(self.population, label_share=share)
        rows = [{"fit": "population", **measure(exact, self.population)}]
        if sampled:
            train, labelled, test = self.moments
            model = LinearLAM(k, **options).fit(train, labelled=labelled, label_share=share)
            rows.append({"fit": "sample", **measure(model, train, test)})
        return rows

    def descent(self, k: int) -> Row:
        """Gradient descent on the sample, and its angle to the closed form there."""
        controls, (rows, _), (train, _, test) = self.controls, self.samples, self.moments
        model = train_linear_lam(
            rows["o"],
            rows["o_next"],
            k,
            steps=controls.sgd_steps,
            batch_size=controls.sgd_batch,
            learning_rate=controls.sgd_learning_rate,
            generator=torch.Generator().manual_seed(controls.seed),
        )
        angle = subspace_angle(model.D, LinearLAM(k).fit(train).D)
        return {"fit": "sgd", **measure(model, train, test), "angle_degrees": angle}


def measure(model: LinearLAM, moments: JointMoments, held_out: JointMoments | None = None) -> Row:
    """Leakage and recovery of a model, in closed form or by a probe on held-out moments, and its loss.

    Args:
        model: fitted.
        moments: of the blocks of a world.
        held_out: the same of other rows; the two R² are then those of the ridge probe.

    Returns:
        Numbers by name.
    """
    known = model.latent_moments(moments)
    if held_out is None:
        found = {"leakage": exogenous_leakage(known), "recovery": action_recovery(known)}
    else:
        test = model.latent_moments(held_out)
        found = {"leakage": probe_r2(known, test, "eps"), "recovery": probe_r2(known, test, "a")}
    sizes = {"loss": model.loss, "optimal_loss": model.optimal_loss, "latent_rank": model.latent_rank}
    return {**found, "inconsistency": inconsistency(known), **sizes}


def noise(controls: Controls) -> list[Row]:
    """Leakage and recovery against σ_ε² / λ_k(Σ_q): the closed form, a sample, and gradient descent on it."""
    rows = []
    (k,) = controls.latent_dim
    for i, variance in enumerate(controls.eps_variance):
        data = Data(controls, eps_variance=variance)
        sampled = i % controls.sampled_every == 0
        found = data.closed_forms(k, sampled=sampled)
        if sampled:
            found.append(data.descent(k))
        rows += [{"eps_variance": variance, "ratio": variance / weakest(controls), **row} for row in found]
    return rows


def weakest(controls: Controls) -> float:
    """λ_k(Σ_q), the first eigenvalue that noise displaces."""
    return sorted(controls.action_variance, reverse=True)[controls.latent_dim[0] - 1]


def capacity(controls: Controls) -> list[Row]:
    """Leakage against k: without a remedy in closed form and by gradient descent, supervised, across views."""
    data = Data(controls)
    rows = []
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "action supervision": {"action_weight": controls.action_weight[0]},
        "cross-view": {"cross_view": True, "gain_rtol": 0.01},
    }
    for k in controls.latent_dim:
        point = {"k": k, "q_rank": controls.actions}
        for remedy, chosen in options.items():
            rows += [{"remedy": remedy, **point, **row} for row in data.closed_forms(k, **chosen)]
        rows.append({"remedy": "none", **point, **data.descent(k)})
    return rows


def remedies(controls: Controls) -> list[Row]:
    """Every remedy against its strength; ``threshold`` is the analytic place of the change."""
    (k,), noisy, own = controls.latent_dim, controls.eps_variance[0], controls.action_variance[0]
    data = Data(controls)
    F, eye = data.world.F, torch.eye(len(data.world.F), dtype=torch.float64)
    weight, share = (noisy - own) / own, (own / noisy) ** 0.5  # B_s is orthonormal
    sweeps: tuple[tuple[str, tuple[float, ...], float, Callable[[float], dict[str, Any]]], ...] = (
        ("action supervision", controls.action_weight, weight, lambda x: {"action_weight": x / controls.label_share}),
        ("optical flow", controls.flow_weight, weight, lambda x: {"flow_weight": x}),
        ("representation", controls.through, share, lambda x: {"representation": eye - (1 - x) * F @ F.pinverse()}),
        ("cross-view", controls.view_correlation, share, lambda _: {"cross_view": True, "gain_rtol": 0.01}),
    )
    rows: list[Row] = []
    for remedy, sweep, threshold, options in sweeps:
        for i, x in enumerate(sweep):
            seen = Data(controls, view_correlation=x) if remedy == "cross-view" else data
            found = seen.closed_forms(k, sampled=i % controls.sampled_every == 0, **options(x))
            rows += [{"remedy": remedy, "strength": x, "threshold": threshold, **row} for row in found]
    pairs = multi_step_threshold(data.world, controls.truncation)
    for count in controls.pairs:
        rows.append({"remedy": "multi-step", "strength": count, "threshold": pairs, **_multi_step(data, count)})
    return rows


def _multi_step(data: Data, pairs: int) -> Row:
    """Means over the seeds of a model whose representation comes from so many labelled pairs."""
    controls, found = data.controls, []
    for repeat in range(controls.repeats):
        drawn = data.world.sample(pairs, torch.Generator().manual_seed(controls.seed + repeat))
        few = SampleMoments(**{name: drawn[name] for name in ("o", "o_ahead", "a")})
        P = multi_step_projection(few, rtol=controls.truncation)
        model = LinearLAM(controls.latent_dim[0], representation=P).fit(data.population)
        row = measure(model, data.population)
        found.append({**row, "projected_noise": float(torch.linalg.matrix_norm(P @ data.world.F, 2))})
    return {"fit": "sample", **{name: sum(row[name] for row in found) / len(found) for name in found[0]}}


def multi_step_threshold(world: World, truncation: float) -> float:
    """Labelled pairs from which the truncation removes what the estimation noise of the inverse model adds.

    The coefficients of ξ_t and ξ_{t+h} are zero in the population. Estimated from N pairs they are, in standard
    deviations of ξ, a (2p, n) matrix of noise with entries of variance v / N, v the residual variance of the action
    times the variance of ξ over that of ξ given the rest. Its largest singular value is about √(v / N) · (√(2p) + √n)
    (Davidson and Szarek 2001), and what is below ``truncation`` times the largest one of the coefficients is dropped.

    Args:
        world: with the horizon of the inverse model and orthonormal [E F].
        truncation: relative singular value.

    Returns:
        N* = v · ((√(2p) + √n) / (truncation · S₁))².
    """
    moments, F = world.population(), world.F
    (d, n), p = F.shape, world.B_s.shape[1]
    names = ("o", "o_ahead")
    joint = torch.cat([torch.cat([moments.covariance(x, y) for y in names], 1) for x in names])
    precision = torch.linalg.inv(joint)
    to_pair = torch.cat([moments.covariance("a", name) for name in names], 1)
    residual = float((moments.covariance("a", "a") - to_pair @ precision @ to_pair.mT).trace()) / p
    variance = F.mT @ (moments.covariance("o", "o") + moments.covariance("o_ahead", "o_ahead")) @ F / 2  # of ξ
    halves = (precision[:d, :d], precision[d:, d:])
    v = residual * sum(float((F.mT @ half @ F @ variance).trace()) for half in halves) / (2 * n)
    largest = float(torch.linalg.matrix_norm(inverse_coefficients(moments)[1], 2))
    return v * ((math.sqrt(2 * p) + math.sqrt(n)) / (truncation * largest)) ** 2


def dependence(controls: Controls) -> list[Row]:
    """ε correlated with the action by c: ``expected_*`` is what the theorem says for independent processes.

    ``c_squared`` is what the action itself says about ε: no latent action that recovers the action leaks less.
    """
    rows = []
    (k,) = controls.latent_dim
    settings = [(variance, "none", 0.0) for variance in controls.eps_variance]
    settings.append((max(controls.eps_variance), "action supervision", controls.action_weight[0]))
    for variance, remedy, weight in settings:
        leaks = remedy == "none" and variance > weakest(controls)
        point = {"eps_variance": variance, "remedy": remedy}
        expected = {"expected_leakage": float(leaks), "expected_recovery": float(not leaks)}
        for i, c in enumerate(controls.coupling):
            data = Data(controls, eps_variance=variance, coupling=c)
            sampled = i % controls.sampled_every == 0
            found = data.closed_forms(k, sampled=sampled, action_weight=weight)
            if sampled and remedy == "none":
                found.append(data.descent(k))
            rows += [{**point, "c": c, "c_squared": c * c, **expected, **row} for row in found]
    return rows
