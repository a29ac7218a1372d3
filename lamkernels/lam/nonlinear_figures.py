"""The figures of the nonlinear experiments: trained models with their intervals beside the closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lamkernels.lam.collapse import interval
from lamkernels.lam.experiment_figures import LEAKAGE, RATIO, RECOVERY, SHARE, UNIT
from lamkernels.lam.figures import INK, new_figure, styled, to_png

MEASURES = {"leakage": (LEAKAGE, "exogenous leakage"), "recovery": (RECOVERY, "action recovery")}
MODELS = {  # bottleneck: line, marker, name
    "linear": ("-", "", "linear, closed form"),
    "none": ("--", "o", "network, continuous"),
    "gaussian": ("--", "v", "Gaussian"),
    "vq": ("-.", "s", "VQ, straight-through"),
    "gradient": ("-.", "<", "VQ, learned by gradient"),
    "rotation": ("-.", "D", "VQ, rotation"),
    "noise": ("-.", "P", "VQ, noise"),
    "residual": ("-.", "X", "VQ, residual"),
    "simvq": ("-.", ">", "SimVQ"),
    "fsq": (":", "^", "FSQ"),
}

Rows = Sequence[dict[str, Any]]


@styled
def noise(rows: Rows) -> bytes:
    """Leakage and recovery against the noise."""
    return to_png(_curves(rows, "ratio", [("", rows)], RATIO, "log", 1.0))


@styled
def dependence(rows: Rows) -> bytes:
    """Leakage and recovery against the correlation of ε with the action, a row of panels for each noise level."""
    levels = list(dict.fromkeys(row["eps_variance"] for row in rows))
    groups = [
        (rf", $\sigma_\varepsilon^2 = {level:g}\,\sigma_q^2$", [row for row in rows if row["eps_variance"] == level])
        for level in levels
    ]
    return to_png(_curves(rows, "coupling", groups, "c (1), correlation of ε with a", "linear", None))


@styled
def bottlenecks(rows: Rows) -> bytes:
    """Leakage and recovery of every bottleneck, below and above the threshold."""
    levels = list(dict.fromkeys(row["ratio"] for row in rows))
    groups = [
        (f"noise {level:g} × the weakest action", [row for row in rows if row["ratio"] == level]) for level in levels
    ]
    return to_png(bars(groups, lambda row: MODELS[row["bottleneck"]][2]))


@styled
def remedies(rows: Rows) -> bytes:
    """Leakage and recovery under every remedy, a panel for each model."""
    models = list(dict.fromkeys(row["bottleneck"] for row in rows))
    groups = [(MODELS[model][2], [row for row in rows if row["bottleneck"] == model]) for model in models]
    return to_png(bars(groups, lambda row: row["remedy"]))


def _curves(
    rows: Rows, x: str, groups: Sequence[tuple[str, Rows]], label: str, scale: str, threshold: float | None
) -> Any:
    models = [name for name in MODELS if any(row["bottleneck"] == name for row in rows)]
    figure, axes = new_figure(len(groups), 2, (10.5, 0.8 + 3.4 * len(groups)), sharex=True, sharey=True)
    for line_of_axes, (title, own) in zip(axes, groups, strict=True):
        for axis, (measure, (colour, name)) in zip(line_of_axes, MEASURES.items(), strict=True):
            places = sorted({row[x] for row in own})
            for model in models:
                line, marker, _ = MODELS[model]
                found = [_interval([row for row in own if row["bottleneck"] == model], measure, x, p) for p in places]
                means, halves = zip(*found, strict=True)
                shade = INK if model == "linear" else colour
                axis.errorbar(
                    places, means, None if model == "linear" else halves, color=shade, linestyle=line,
                    marker=marker, markersize=5, capsize=2, linewidth=2.5 if model == "linear" else 1.2,
                    alpha=0.5 if model == "linear" else 1.0, label=MODELS[model][2],
                )  # fmt: skip
            axis.set(title=name.capitalize() + title, xscale=scale, ylim=UNIT)
            if threshold is not None:
                axis.axvline(threshold, color=INK, linewidth=1, linestyle=":")
        line_of_axes[0].set_ylabel(SHARE)
    for axis in axes[-1]:
        axis.set_xlabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _interval(rows: Rows, measure: str, x: str, place: float) -> tuple[float, float]:
    return interval([row[measure] for row in rows if row[x] == place])


def bars(
    groups: Sequence[tuple[str, Rows]],
    name: Callable[[dict[str, Any]], str],
    measures: Mapping[str, tuple[str, str]] = MEASURES,
    height: float = 4.2,
) -> Any:
    """A figure with a panel for each group of rows, and in it two bars for each name: two measures, with intervals.

    Args:
        groups: title and rows of each panel.
        name: of the bars that a row belongs to.
        measures: columns of the rows, upper bar first, with colour and label.
        height: inches.
    """
    figure, (axes,) = new_figure(1, len(groups), (10.5, height), sharey=True)
    for axis, (title, own) in zip(axes, groups, strict=True):
        names = list(dict.fromkeys(map(name, own)))
        for shift, (measure, (colour, label)) in zip((-0.2, 0.2), measures.items(), strict=True):
            found = [interval([row[measure] for row in own if name(row) == wanted]) for wanted in names]
            means, halves = zip(*found, strict=True)
            places = [i + shift for i in range(len(names))]
            axis.barh(places, means, 0.38, xerr=halves, color=colour, capsize=2, label=label)
        axis.set(title=title, xlim=UNIT, xlabel=SHARE)
        axis.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
