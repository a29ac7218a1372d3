"""The figures of the report: each function returns a PNG."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from lamkernels.lam.compare import relative_difference
from lamkernels.lam.model import LatentActionModel

P = ParamSpec("P")

STOCK, FUSED, INK, GRID = "#e08214", "#2166ac", "#22272e", "#d8dee4"
FLOOR = 1e-17  # differences below it are drawn there
ZOOM = 28  # side of the window around what the codes change, pixels
WORDS = 6  # code words drawn


def _style() -> Any:
    return {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": "#8b949e",
        "axes.labelcolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "image.interpolation": "nearest",
    }


def styled(draw: Callable[P, bytes]) -> Callable[P, bytes]:
    """Draws with the style of the report and leaves matplotlib's settings alone."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        from matplotlib import rc_context

        with rc_context(_style()):
            return draw(*args, **kwargs)

    return drawn


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of ``size`` inches and its axes (rows, columns), without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def to_png(figure: Any) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


@styled
def curves(results: dict[str, Any]) -> bytes:
    """Both loss curves, one over the other, and their relative difference at every step."""
    stock, fused = (torch.tensor(results["curves"][name]["loss"], dtype=torch.float64) for name in ("stock", "fused"))
    steps = range(1, len(stock) + 1)
    figure, ((left, right),) = new_figure(1, 2, (10.5, 3.6))
    left.plot(steps, stock.numpy(), color=STOCK, linewidth=4.5, alpha=0.55, label="stock", solid_capstyle="round")
    left.plot(steps, fused.numpy(), color=FUSED, linewidth=1.2, label="fused")
    left.set(title="Training loss", xlabel="step", ylabel="loss (1 = nothing moves)", ylim=(0, None))
    left.legend(loc="upper right")
    for label, curves, size, colour in (
        ("float32, the timed steps", results["float32_curves"], 2**-23, "#9aa4ae"),
        ("float64, the whole run", results["curves"], 2**-52, FUSED),
    ):
        first, second = (torch.tensor(curves[name]["loss"], dtype=torch.float64) for name in ("stock", "fused"))
        apart = relative_difference(first, second).clamp(min=FLOOR)
        right.plot(range(1, len(apart) + 1), apart.numpy(), ".", color=colour, markersize=3, label=label)
        right.axhline(size, color=colour, linewidth=1, linestyle=":")
        right.text(len(stock), size * 1.5, "one rounding", color="#57606a", ha="right", va="bottom")
    right.set(title="Distance from the stock run, relative", xlabel="step", yscale="log", ylim=(FLOOR / 3, 1))
    right.legend(loc="upper right", markerscale=3)
    return to_png(figure)


@styled
def usage(results: dict[str, Any], codes: Tensor, actions: Tensor) -> bytes:
    """How often each token uses each code, and which actions were played under the commonest code words.

    Args:
        results: of the demonstration.
        codes: (M, tokens) int64: the fused model's codes of the held-out transitions.
        actions: (M,) int64: what was played.
    """
    figure, ((left, right),) = new_figure(1, 2, (10.5, 3.4), width_ratios=(1, 1.25))
    counts = torch.tensor(results["code_usage"]["fused"]["counts"])
    share = counts / counts.sum(1, keepdim=True)
    left.grid(False)
    left.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=max(0.5, float(share.max())), aspect="auto")
    for (token, code), value in zip(
        torch.cartesian_prod(*map(torch.arange, share.shape)), share.flatten(), strict=True
    ):
        if value >= 0.005:
            left.text(code, token, f"{value:.0%}", ha="center", va="center", fontsize=8, color=_ink_on(float(value)))
    left.set(title="Use of the codes", xlabel="code", xticks=range(share.shape[1]), yticks=range(share.shape[0]))
    left.set_yticklabels([f"token {i}" for i in range(share.shape[0])])

    names = results["action_recovery"]["fused"]["action_names"]
    words, members = common_words(codes, WORDS + 4)
    colours = ("#bdbdbd", "#2166ac", "#e08214", "#1b7837")
    right.grid(False, axis="y")
    for row, member in enumerate(members):
        parts, start = torch.bincount(actions[member], minlength=len(names)) / len(actions), 0.0
        for action, part in enumerate(parts.tolist()):
            label = names[action].lower() if row == 0 else None
            right.barh(row, 100 * part, left=100 * start, color=colours[action], height=0.75, label=label)
            start += part
    right.set(title="Actions played under the commonest code words", xlabel="% of the held-out transitions")
    right.set_yticks(range(len(words)), [word_name(word) for word in words], family="monospace")
    right.invert_yaxis()
    right.legend(loc="lower right")
    return to_png(figure)


@styled
@torch.no_grad()
def predictions(model: LatentActionModel, frames: Tensor, next_frames: Tensor, names: Sequence[str]) -> bytes:
    """Frame, next frame, prediction, and the true and predicted changes.

    Args:
        model: in evaluation mode.
        frames: (R, 3, S, S) uint8, one per row of the figure.
        next_frames: (R, 3, S, S) uint8.
        names: R actions.
    """
    device = next(model.parameters()).device
    output = model(frames.to(device), next_frames.to(device)).prediction.cpu()
    now, then = frames.float() / 255, next_frames.float() / 255
    columns = ("frame", "next frame", "prediction", "true change", "predicted change")
    figure, axes = new_figure(len(frames), 5, (10.5, 2.15 * len(frames)))
    for row in range(len(frames)):
        change, predicted = ((image[row] - now[row]).mean(0) for image in (then, output))
        limit = float(change.abs().max().clamp(min=0.02))
        for axis, image in zip(axes[row], (now[row], then[row], output[row], change, predicted), strict=True):
            picture(axis, image, limit)
        axes[row, 0].set_ylabel(names[row].lower(), fontweight="bold")
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title)
    return to_png(figure)


@styled
@torch.no_grad()
def what_codes_do(
    model: LatentActionModel, frame: Tensor, next_frame: Tensor, codes: Tensor, actions: Tensor, names: Sequence[str]
) -> bytes:
    """One frame under each of the commonest code words: the predictions, zoomed to where they differ.

    Args:
        model: in evaluation mode, with a codebook.
        frame: (3, S, S) uint8.
        next_frame: (3, S, S) uint8: what came.
        codes: (M, tokens) int64 of the held-out transitions.
        actions: (M,) int64.
        names: of the actions.
    """
    words, members = common_words(codes, WORDS)
    codebook: Tensor = model.bottleneck.codebook  # type: ignore[assignment]
    device = codebook.device
    latent = codebook[words.to(device)]  # (W, tokens, D)
    future = model.predict(frame[None].to(device).expand(len(words), -1, -1, -1), latent).cpu()
    now, then = frame.float() / 255, next_frame.float() / 255
    changes = (future - now).mean(1)
    window = _window(changes.var(0, correction=0), ZOOM)
    limit = float(changes.abs().max().clamp(min=0.02))
    figure, axes = new_figure(2, len(words) + 1, (10.5, 3.4))
    picture(axes[0, 0], then[(slice(None), *window)], limit)
    picture(axes[1, 0], (then - now).mean(0)[window], limit)
    axes[0, 0].set_title("what came")
    axes[0, 0].set_ylabel("next frame")
    axes[1, 0].set_ylabel("change")
    for column, (word, member) in enumerate(zip(words, members, strict=True), start=1):
        picture(axes[0, column], future[(column - 1, slice(None), *window)], limit)
        picture(axes[1, column], changes[column - 1][window], limit)
        share = torch.bincount(actions[member], minlength=len(names)) / len(member)
        best = int(share.argmax())
        axes[0, column].set_title(
            f"{word_name(word)}\n{names[best].lower()} {share[best]:.0%}", loc="center", fontsize=9
        )
    return to_png(figure)


def common_words(codes: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
    """The commonest rows of codes (M, tokens), most frequent first, and the places of each: (W, tokens), W × (n,)."""
    words, inverse, frequency = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    order = frequency.argsort(descending=True, stable=True)[:count]
    return words[order], [(inverse == int(word)).nonzero().squeeze(1) for word in order]


def word_name(word: Tensor) -> str:
    """The codes of a word (tokens,), as "3·0·7·1"."""
    return "·".join(str(int(code)) for code in word)


def _window(weight: Tensor, side: int) -> tuple[slice, slice]:
    """The square of ``side`` pixels of (S, S) that holds the most ``weight``."""
    side = min(side, weight.shape[0])
    sums = torch.nn.functional.avg_pool2d(weight[None, None], side, stride=1)[0, 0]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return slice(top, top + side), slice(left, left + side)


def picture(axis: Any, image: Tensor, limit: float) -> None:
    """Draws an image (3, H, W) in [0, 1], or a change (H, W) in red and blue up to ±``limit``."""
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    if image.ndim == 3:
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
    else:
        axis.imshow(image.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)


def _ink_on(value: float) -> str:
    return "white" if value > 0.3 else INK
