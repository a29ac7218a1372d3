"""The figures of the linear experiments: each function takes an experiment's rows and returns a PNG.

Lines are the population, hollow markers samples, crosses gradient descent; every colour has a line style or a marker of
its own, so that the figures read in greyscale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamkernels.lam.figures import FUSED, GRID, INK, STOCK, new_figure, styled, to_png

LEAKAGE, RECOVERY, OTHER = STOCK, FUSED, "#1b7837"
CURVES = {  # measure: colour, line, marker, name
    "leakage": (LEAKAGE, "-", "o", "exogenous leakage"),
    "recovery": (RECOVERY, "--", "s", "action recovery"),
}
REMEDIES = {  # remedy: the same
    "none": (LEAKAGE, "-", "o", "no remedy"),
    "action supervision": (RECOVERY, "--", "s", "action supervision"),
    "cross-view": (OTHER, "-.", "^", "cross-view"),
}
SHARE, UNIT = "partial R² given o (1)", (-0.05, 1.05)
RATIO = r"$\sigma_\varepsilon^2\,/\,\lambda_k(\Sigma_q)$ (1)"

Rows = Sequence[dict[str, Any]]


@styled
def noise(rows: Rows) -> bytes:
    """Leakage and recovery against the noise, and how far gradient descent stays above L*."""
    figure, ((left, right),) = new_figure(1, 2, (10.5, 4.2), width_ratios=(1.9, 1))
    for measure, style in CURVES.items():
        _series(left, rows, "ratio", measure, style)
    _threshold(left, 1.0, "theorem", height=0.68)
    left.set(title="What the latent action says", xlabel=RATIO, ylabel=SHARE, xscale="log", ylim=UNIT)
    trained = [row for row in rows if row["fit"] == "sgd"]
    excess = [row["loss"] / row["optimal_loss"] - 1 for row in trained]
    right.plot([row["ratio"] for row in trained], excess, "x:", color=INK)
    right.axhline(1e-3, color=INK, linewidth=1, linestyle="--")
    right.text(trained[0]["ratio"], 1.1e-3, "0.1 %", va="bottom")
    right.set(title="SGD above the closed form", xlabel=RATIO, xscale="log", yscale="log")
    right.set(ylabel="loss / L* − 1 (1)", ylim=(min(1e-5, *excess), max(1e-2, *excess)))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return to_png(figure)


@styled
def capacity(rows: Rows) -> bytes:
    """Leakage and the dimensions in use against the number of latent dimensions."""
    figure, ((left, right),) = new_figure(1, 2, (10.5, 4.4), sharex=True)
    for axis, measure in ((left, "leakage"), (right, "latent_rank")):
        for remedy, style in REMEDIES.items():
            _series(axis, [row for row in rows if row["remedy"] == remedy], "k", measure, style)
        axis.set_xlabel("k, latent dimensions")
        _threshold(axis, rows[0]["q_rank"], r"rank $\Sigma_q$")
    left.set(title="Spare capacity leaks", ylabel=f"exogenous leakage, {SHARE}", ylim=UNIT)
    right.set(title="Dimensions in use", ylabel="entries of z with a gain")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return to_png(figure)


@styled
def remedies(rows: Rows) -> bytes:
    """One panel per remedy: leakage and recovery against its strength."""
    noise_ratio = r"$\sigma_q\,/\,\sigma_\varepsilon$"
    panels = {
        "action supervision": (
            r"$\lambda\rho$, weight × label share",
            r"$(\sigma_\varepsilon^2-\sigma_q^2)/\sigma_a^2$",
        ),
        "optical flow": (r"$\lambda$, weight of the flow", r"$(\sigma_\varepsilon^2-\sigma_q^2)/\sigma_q^2$"),
        "representation": ("‖P F‖ / ‖F‖ (1), noise let through", noise_ratio),
        "cross-view": ("correlation of the backgrounds (1)", noise_ratio),
        "multi-step": ("labelled pairs of the inverse model", "noise below truncation"),
    }
    figure, axes = new_figure(2, 3, (10.5, 6.2), sharey=True)
    for axis, (remedy, (label, threshold)) in zip(axes.flat, panels.items(), strict=False):
        own = [row for row in rows if row["remedy"] == remedy]
        for measure, style in CURVES.items():
            _series(axis, own, "strength", measure, style)
        axis.set(
            title=remedy.capitalize(), xlabel=label, ylim=UNIT, xscale="log" if remedy == "multi-step" else "linear"
        )
        _threshold(axis, own[0]["threshold"], threshold)
    for axis in axes[:, 0]:
        axis.set_ylabel(SHARE)
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center left")
    return to_png(figure)


@styled
def dependence(rows: Rows) -> bytes:
    """Leakage and recovery against the correlation of ε with the action, and what independence would predict."""
    settings = list(dict.fromkeys((row["eps_variance"], row["remedy"]) for row in rows))
    figure, (axes,) = new_figure(1, len(settings), (10.5, 4.2), sharey=True)
    for axis, (variance, remedy) in zip(axes, settings, strict=True):
        own = [row for row in rows if (row["eps_variance"], row["remedy"]) == (variance, remedy)]
        for measure, style in CURVES.items():
            _series(axis, own, "c", measure, style)
            axis.axhline(own[0][f"expected_{measure}"], color=style[0], linewidth=5, alpha=0.25, zorder=0)
        bound = [(row["c"], row["c_squared"]) for row in own if row["fit"] == "population"]
        axis.plot(*zip(*bound, strict=True), color=INK, linewidth=1, linestyle=":", label="c², what a says about ε")
        title = rf"$\sigma_\varepsilon^2 = {variance:g}\,\sigma_q^2$, {REMEDIES[remedy][3]}"
        axis.set(title=title, xlabel="c (1), correlation of ε with a", ylim=UNIT)
    axes[0].set_ylabel(SHARE)
    axes[0].plot([], [], color=INK, linewidth=5, alpha=0.25, label="if independent")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return to_png(figure)


@styled
def controls(rows: Rows) -> bytes:
    """The controls of every figure as a table; sweeps by their ends and the number of values."""
    names = [name for name in rows[0] if name != "figure"]
    figure, ((axis,),) = new_figure(1, 1, (10.5, 0.26 * (len(names) + 1)))
    axis.axis("off")
    table = axis.table(
        cellText=[[_summary(row[name]) for row in rows] for name in names],
        rowLabels=[name.replace("_", " ") for name in names],
        colLabels=[row["figure"] for row in rows],
        cellLoc="center",
        bbox=(0.12, 0, 0.88, 1),
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    for cell in table.get_celld().values():
        cell.set_edgecolor(GRID)
    return to_png(figure)


def _series(axis: Any, rows: Rows, x: str, y: str, style: tuple[str, str, str, str]) -> None:
    """A line for the population, hollow markers for samples, crosses for gradient descent."""
    colour, line, marker, name = style
    for fit in dict.fromkeys(row["fit"] for row in rows):
        points = [(row[x], row[y]) for row in rows if row["fit"] == fit]
        styles: dict[str, dict[str, Any]] = {
            "population": {"linestyle": line, "linewidth": 1.8, "label": f"{name}, population"},
            "sample": {"linestyle": "none", "marker": marker, "markerfacecolor": "none", "label": f"{name}, sample"},
            "sgd": {"linestyle": "none", "marker": "x", "markersize": 8, "label": f"{name}, SGD"},
        }
        axis.plot(*zip(*points, strict=True), color=colour, **styles[fit])


def _threshold(axis: Any, place: float, name: str, height: float = 0.5) -> None:
    axis.axvline(place, color=INK, linewidth=1, linestyle=":")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.9}
    options = {"rotation": 90, "va": "center", "fontsize": 9, "bbox": box, "zorder": 1.5}
    axis.annotate(
        name, (place, height), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points", **options
    )


def _summary(value: object) -> str:
    if not isinstance(value, tuple):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if len(value) <= 3:
        return ", ".join(f"{v:g}" for v in value) or "–"
    return f"{value[0]:g} … {value[-1]:g} ({len(value)})"
