"""The figure of the collapse experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lamkernels.lam.figures import FUSED, INK, STOCK, new_figure, styled, to_png

PANELS = {
    "usage": ("Codes in use", "share of the codebook (1)"),
    "perplexity": ("Perplexity", "codes, were all equally likely"),
    "reconstruction_loss": ("Reconstruction", "mean squared error"),
}
STYLES = (
    (STOCK, "-"), ("#7b3294", "--"), ("#a6761d", "-."), ("#1b7837", ":"), (FUSED, "-"), ("#d6604d", "--"), (INK, "-."),
)  # fmt: skip


@styled
def curves(rows: Sequence[dict[str, Any]], interval: Callable[[Sequence[float]], tuple[float, float]]) -> bytes:
    """Each measure against the step: the mean over seeds, and its interval as a band."""
    figure, (axes,) = new_figure(1, len(PANELS), (10.5, 4.4))
    for remedy, (colour, line) in zip(dict.fromkeys(row["remedy"] for row in rows), STYLES, strict=True):
        own = [row for row in rows if row["remedy"] == remedy]
        steps = list(dict.fromkeys(row["step"] for row in own))
        for axis, measure in zip(axes, PANELS, strict=True):
            found = [interval([row[measure] for row in own if row["step"] == step]) for step in steps]
            axis.plot(steps, [mean for mean, _ in found], color=colour, linestyle=line, linewidth=1.8, label=remedy)
            axis.fill_between(
                steps, [m - half for m, half in found], [m + half for m, half in found], color=colour, alpha=0.15, lw=0
            )
    for axis, (title, label) in zip(axes, PANELS.values(), strict=True):
        axis.set(title=title, xlabel="step", ylabel=label)
        axis.set_ylim(0, None)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return to_png(figure)
