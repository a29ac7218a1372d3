"""The figures of the experiments on frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lamkernels.lam.collapse import interval
from lamkernels.lam.experiment_figures import LEAKAGE, RECOVERY, SHARE, UNIT
from lamkernels.lam.figures import INK, new_figure, styled, to_png
from lamkernels.lam.nonlinear_figures import MODELS, bars

Rows = Sequence[dict[str, Any]]

MEASURES = {
    "leakage": (LEAKAGE, "exogenous leakage"),
    "recovery": (RECOVERY, "recovery, linear probe"),
    "recovery_features": (RECOVERY, "recovery, probe on features"),
}


@styled
def noise(rows: Rows) -> bytes:
    """Leakage and recovery against the noise; where noise outweighs the agent as a whole, a second line."""
    figure, axes = _curves(rows, "ratio", [("", rows)])
    agent = sum(row["ratio"] / row["agent_ratio"] for row in rows if row["ratio"]) / len(rows)
    for axis in axes[0]:
        axis.set(xscale="log", xlabel="overlay / first eigenvalue of the game's innovation")
        axis.axvline(1.0, color=INK, linewidth=1, linestyle=":")
        axis.axvline(agent, color=INK, linewidth=1, linestyle="-.")
    return to_png(figure)


@styled
def dependence(rows: Rows) -> bytes:
    """The same against the correlation of ε with the action, a row of panels for each noise level."""
    levels = list(dict.fromkeys(row["ratio"] for row in rows))
    groups = [(f", ratio {level:g}", [row for row in rows if row["ratio"] == level]) for level in levels]
    figure, axes = _curves(rows, "coupling", groups)
    for axis in axes[-1]:
        axis.set_xlabel("c (1), correlation of ε₁ with the action")
    return to_png(figure)


@styled
def remedies(rows: Rows) -> bytes:
    """Leakage and recovery under every remedy, a panel for each bottleneck."""
    models = list(dict.fromkeys(row["bottleneck"] for row in rows if row["bottleneck"] != "linear"))
    groups = [(MODELS[model][2], [row for row in rows if row["bottleneck"] == model]) for model in models]
    return _bars(groups, lambda row: str(row["remedy"]))


@styled
def bottlenecks(rows: Rows) -> bytes:
    """Leakage and recovery of every bottleneck, a panel for each noise level."""
    levels = list(dict.fromkeys(row["ratio"] for row in rows))
    groups = [(f"ratio {level:g}", [row for row in rows if row["ratio"] == level]) for level in levels]
    return _bars(groups, lambda row: MODELS[row["bottleneck"]][2])


def _bars(groups: Sequence[tuple[str, Rows]], name: Callable[[dict[str, Any]], str]) -> bytes:
    count = len({name(row) for _, own in groups for row in own})
    measures = {measure: MEASURES[measure] for measure in ("leakage", "recovery_features")}
    return to_png(bars(groups, name, measures, 0.45 * count + 1.4))


def _curves(rows: Rows, x: str, groups: Sequence[tuple[str, Rows]]) -> tuple[Any, Any]:
    models = [name for name in MODELS if any(row["bottleneck"] == name for row in rows)]
    figure, axes = new_figure(len(groups), 3, (12.5, 0.8 + 3.4 * len(groups)), sharex=True, sharey=True)
    for line_of_axes, (title, own) in zip(axes, groups, strict=True):
        for axis, (measure, (colour, name)) in zip(line_of_axes, MEASURES.items(), strict=True):
            places = sorted({row[x] for row in own})
            for model in models:
                line, marker, label = MODELS[model]
                found = [
                    interval([row[measure] for row in own if row["bottleneck"] == model and row[x] == place])
                    for place in places
                ]
                means, halves = zip(*found, strict=True)
                linear = model == "linear"
                axis.errorbar(
                    places, means, halves, color=INK if linear else colour, linestyle=line, marker=marker, markersize=5,
                    capsize=2, linewidth=2.5 if linear else 1.2, alpha=0.5 if linear else 1.0, label=label,
                )  # fmt: skip
            axis.set(title=name.capitalize() + title, ylim=UNIT)
        line_of_axes[0].set_ylabel(SHARE)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, axes
