"""``python -m lamkernels.lam.nonlinear_experiments [names] --out DIR``: does the linear analysis predict networks?

The worlds, the noise levels and the two R² of :mod:`linear_experiments`, with :class:`VectorLAM` in the place of the
linear model: the closed form stands beside each trained model as its prediction. Each point is written when it is done,
and a run that was stopped goes on behind the last one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamkernels.lam import commands, nonlinear_figures
from lamkernels.lam.blocks import SampleMoments
from lamkernels.lam.bottlenecks import BOTTLENECKS
from lamkernels.lam.journal import kept_rows, write_experiments
from lamkernels.lam.linear import LinearLAM
from lamkernels.lam.linear_experiments import Controls, Data, Row, measure, weakest
from lamkernels.lam.linear_metrics import pair_inconsistency, probe_r2
from lamkernels.lam.multi_step import multi_step_projection
from lamkernels.lam.vector_lam import Transitions, VectorLAM, train_vector_lam

REMEDIES = ("none", "action supervision", "10 % labelled", "optical flow", "representation", "multi-step", "cross-view")


@dataclass(frozen=True)
class NonlinearControls:
    """Everything that a figure depends on.

    Attributes:
        linear: worlds, sweeps and sizes, as for the linear experiments.
        bottlenecks: of the trained models.
        remedies: of :data:`REMEDIES`.
        weight: λρ of action supervision, whatever the share ρ of labels, and λ of the optical flow.
        codebook_size: K.
        hidden: width of the networks.
        steps: of the optimiser.
        batch_size: transitions of a step.
        learning_rate: at the first step.
        seeds: of the world, the samples and the training; each gives a model of its own.
    """

    linear: Controls
    bottlenecks: tuple[str, ...] = ("none", "vq")
    remedies: tuple[str, ...] = ("none",)
    weight: float = 10.0
    codebook_size: int = 64
    hidden: int = 64
    steps: int = 2000
    batch_size: int = 512
    learning_rate: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)

    def quick(self) -> NonlinearControls:
        """Fewer points, seeds, samples and steps: seconds instead of minutes."""
        linear = replace(
            self.linear,
            samples=1000,
            eps_variance=self.linear.eps_variance[::4],
            coupling=self.linear.coupling[::3],
        )
        return replace(self, linear=linear, steps=30, seeds=self.seeds[:2])


SPREAD = Controls(action_variance=(2.0, 1.0, 0.5), eps_spectrum=(1.0, 0.7, 0.5))  # λ_k(Σ_q) is 0.5
# no two of all eigenvalues are equal: where they are, the seed decides what is encoded
LEVELS = tuple(round(0.5 * ratio, 12) for ratio in (0.125, 0.25, 0.5, 0.7, 1.4, 2.5, 6.0, 16.0))
CONTROLS = {
    "noise": NonlinearControls(replace(SPREAD, eps_variance=LEVELS), bottlenecks=("none", "vq", "fsq")),
    "bottlenecks": NonlinearControls(replace(SPREAD, eps_variance=(0.125, 8.0)), bottlenecks=tuple(BOTTLENECKS)),
    "remedies": NonlinearControls(Controls(eps_variance=(4.0,), horizon=2), remedies=REMEDIES),
    "dependence": NonlinearControls(Controls(eps_variance=(0.5, 2.0), coupling=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0))),
}
DRAW: dict[str, Callable[[list[Row]], bytes]] = {
    "noise": nonlinear_figures.noise,
    "bottlenecks": nonlinear_figures.bottlenecks,
    "remedies": nonlinear_figures.remedies,
    "dependence": nonlinear_figures.dependence,
}


@dataclass(frozen=True)
class Point:
    """One model to train: a place of the sweep, a remedy, a bottleneck ("linear" for the closed form), a seed."""

    eps_variance: float
    coupling: float
    remedy: str
    bottleneck: str
    seed: int


def points(controls: NonlinearControls) -> Iterator[Point]:
    """All models of an experiment, worlds in the outer loops: a world is drawn once."""
    for seed in controls.seeds:
        for variance in controls.linear.eps_variance:
            for coupling in controls.linear.coupling:
                for remedy in controls.remedies:
                    for bottleneck in ("linear", *controls.bottlenecks):
                        yield Point(variance, coupling, remedy, bottleneck, seed)


@dataclass
class Runner:
    """Trains and measures the models of an experiment.

    Attributes:
        controls: of the experiment.
    """

    controls: NonlinearControls
    _last: tuple[Any, Data] | None = field(default=None, init=False)

    def run(self, point: Point) -> Row:
        """The numbers of one model: exogenous leakage, action recovery and inconsistency, on held-out transitions."""
        data = self._data(point)
        row: Row = {**asdict(point), "ratio": point.eps_variance / weakest(self.controls.linear)}
        measured = self._linear(data, point.remedy) if point.bottleneck == "linear" else self._trained(data, point)
        return {**row, **measured}

    def _data(self, point: Point) -> Data:
        key = point.seed, point.eps_variance, point.coupling
        if self._last is None or self._last[0] != key:
            linear = replace(self.controls.linear, seed=point.seed)
            self._last = key, Data(linear, eps_variance=point.eps_variance, coupling=point.coupling)
        return self._last[1]

    def _linear(self, data: Data, remedy: str) -> Row:
        """The closed form on the population."""
        weight, P = self.controls.weight, self._projection(data, remedy, sampled=False)
        options: dict[str, dict[str, Any]] = {
            "action supervision": {"action_weight": weight},
            "10 % labelled": {"action_weight": weight},
            "optical flow": {"flow_weight": weight},
            "cross-view": {"cross_view": True, "gain_rtol": 0.01},
        }
        (k,) = self.controls.linear.latent_dim
        model = LinearLAM(k, representation=P, **options.get(remedy, {})).fit(data.population)
        found = measure(model, data.population)
        return {name: found[name] for name in ("leakage", "recovery", "inconsistency")}

    def _trained(self, data: Data, point: Point) -> Row:
        controls = self.controls
        rows, held_out = ({name: block.float() for name, block in part.items()} for part in data.samples)
        (k,) = controls.linear.latent_dim
        found = self._projection(data, point.remedy, sampled=True)
        P = None if found is None else found.float()
        transitions, weight = self._transitions(rows, point.remedy, P)
        model = train_vector_lam(
            transitions, k, point.bottleneck, auxiliary_weight=weight, codebook_size=controls.codebook_size,
            hidden=controls.hidden, steps=controls.steps, batch_size=controls.batch_size,
            learning_rate=controls.learning_rate, seed=point.seed,
        )  # fmt: skip
        train, test = (self._moments(model, part, P) for part in (rows, held_out))
        return {
            "leakage": probe_r2(train, test, "eps"),
            "recovery": probe_r2(train, test, "a"),
            "inconsistency": pair_inconsistency(test),
        }

    def _projection(self, data: Data, remedy: str, *, sampled: bool) -> Tensor | None:
        """What o and o' are replaced by, (r, d) fp64: from the population, or from the labelled sample."""
        if remedy == "representation":  # I − F F⁺ leaves what is endogenous
            F = data.world.F
            return torch.eye(len(F), dtype=F.dtype) - F @ F.pinverse()
        if remedy == "multi-step" and sampled:
            rows, _ = data.samples
            labelled = SampleMoments(**{name: rows[name] for name in ("o", "o_ahead", "a")})
            return multi_step_projection(labelled, rtol=self.controls.linear.truncation)
        return multi_step_projection(data.population) if remedy == "multi-step" else None

    def _transitions(self, rows: dict[str, Tensor], remedy: str, P: Tensor | None) -> tuple[Transitions, float]:
        o, o_next = (rows[name] if P is None else rows[name] @ P.mT for name in ("o", "o_next"))
        size, weight = len(o), self.controls.weight
        if remedy == "cross-view":
            return Transitions(o, o_next, rows["o_next_view"], context=rows["o_view"]), 0.0
        if remedy == "optical flow":
            return Transitions(o, o_next, o_next, auxiliary=rows["flow"], labelled=size), weight
        if remedy in ("action supervision", "10 % labelled"):
            share = 0.1 if remedy == "10 % labelled" else 1.0
            labelled = round(share * size)
            return Transitions(o, o_next, o_next, auxiliary=rows["a"], labelled=labelled), weight / share
        return Transitions(o, o_next, o_next), 0.0

    @staticmethod
    def _moments(model: VectorLAM, rows: dict[str, Tensor], P: Tensor | None) -> SampleMoments:
        def latent(first: str, second: str) -> Tensor:
            return model.encode(*(rows[name] if P is None else rows[name] @ P.mT for name in (first, second)))

        known = {name: rows[name] for name in ("o", "o_view", "a", "eps")}
        return SampleMoments(**known, z=latent("o", "o_next"), z_view=latent("o_view", "o_next_view"))


def rows_of(
    controls: NonlinearControls, journal: Path | None = None, *, processes: int = 1, progress: bool = False
) -> list[Row]:
    """All rows of an experiment: :func:`lamkernels.lam.journal.kept_rows`."""
    run = Runner(controls).run
    return kept_rows(controls, list(points(controls)), run, journal, processes=processes, progress=progress)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiments that are named, all without a name; returns the exit status."""
    parser = commands.parser(
        "lamkernels.lam.nonlinear_experiments",
        "Nonlinear latent action models beside the closed form of the linear one: NAME.csv and NAME.png.",
        "nonlinear-lam",
        tuple(CONTROLS),
    )
    commands.add_processes(parser)
    options = parser.parse_args(argv)

    def work() -> None:
        run(options.names, options.out, quick=options.quick, processes=options.processes)

    return commands.status(parser, work)


def run(names: Sequence[str], out: Path, *, quick: bool = False, processes: int | None = None) -> None:
    """Writes ``NAME.csv`` and ``NAME.png`` for each experiment.

    Args:
        names: of :data:`CONTROLS`.
        out: folder; while an experiment runs, its rows are in ``NAME.jsonl`` there.
        quick: fewer points, seeds, samples and steps.
        processes: :func:`lamkernels.lam.commands.processes_of`.

    Raises:
        ModuleNotFoundError: matplotlib or tqdm is not installed.
        OSError: a file cannot be written.
        ValueError: a run with other controls was stopped in ``out``.
    """
    commands.need("matplotlib", "tqdm")
    processes = commands.processes_of(processes)
    write_experiments(names, out, CONTROLS, rows_of, DRAW, quick=quick, processes=processes)


if __name__ == "__main__":
    sys.exit(main())
