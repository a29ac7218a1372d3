"""The figures of ``lamkernels fit``: each function returns a PNG."""

from __future__ import annotations

from typing import Any

from lamkernels.lam.figures import FUSED, STOCK, new_figure, styled, to_png
from lamkernels.lam.linear import LinearLAM

SHOWN = 40  # eigenvalues
COLUMNS = 4  # of images


@styled
def spectrum(results: dict[str, Any]) -> bytes:
    """The variances that latent dimensions explain, and what the action explains of each dimension in use."""
    values, latent, actions = results["eigenvalues"][:SHOWN], results["ranks"]["latent"], results["actions"]
    figure, axes = new_figure(1, 1 if actions is None else 2, (10.5 if actions else 6, 3.8))
    left = axes[0, 0]
    numbers = list(range(1, len(values) + 1))
    left.bar(numbers[:latent], values[:latent], color=FUSED, label="in z")
    left.bar(numbers[latent:], values[latent:], color="white", edgecolor=FUSED, label="left out")
    left.set(title="What each latent dimension explains", xlabel="dimension", ylabel="variance, squared units of o")
    left.legend()
    if actions is not None:
        right, left_over = axes[0, 1], actions["by_dimension"][:latent]
        places = numbers[:latent]
        right.bar(places, [1 - share for share in left_over], color=FUSED, label="by the action")
        right.bar(places, left_over, bottom=[1 - share for share in left_over], color=STOCK, hatch="//",
                  label="by something else")  # fmt: skip
        right.set(title="What explains it, given o", xlabel="dimension", ylabel="share of its variance", ylim=(0, 1))
        right.legend(loc="lower right")
    return to_png(figure)


@styled
def effects(model: LinearLAM, side: int) -> bytes:
    """What one standard deviation of each latent dimension in use adds to the predicted frame.

    Args:
        model: of frames (side, side, 3), flattened.
        side: pixels.
    """
    count = max(1, model.latent_rank)
    columns = min(COLUMNS, count)
    figure, axes = new_figure(-(-count // columns), columns, (2.2 * columns, 2.5 * -(-count // columns)))
    images = model.B.mT.reshape(-1, side, side, 3)[:count].cpu()
    for i, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if i < count:
            reach = float(images[i].abs().amax()) or 1.0
            axis.imshow((0.5 + images[i] / (2 * reach)).numpy())
            axis.set_title(f"dimension {i + 1}")
    figure.suptitle("What a latent dimension adds to the next frame (grey: nothing)")
    return to_png(figure)
