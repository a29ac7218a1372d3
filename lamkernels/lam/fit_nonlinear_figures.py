"""The figures of ``lamkernels fit --model nonlinear``: each function returns a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lamkernels.lam.figures import FUSED, STOCK, common_words, new_figure, picture, styled, to_png, word_name
from lamkernels.lam.model import LatentActionModel

WORDS = 8  # code words, or ends of continuous directions, that are drawn
CODES = 12  # codes of a token
ENTRIES = 18  # of an action


@styled
def losses(curves: Mapping[str, Sequence[float]]) -> bytes:
    """The training losses by step."""
    figure, ((left, right),) = new_figure(1, 2, (10.5, 3.2))
    for axes, name, title, colour in (
        (left, "reconstruction_loss", "Prediction (1 = copying the frame)", FUSED),
        (right, "bottleneck_loss", "Bottleneck", STOCK),
    ):
        axes.plot(curves["step"], curves[name], color=colour, linewidth=1)
        axes.set(title=title, xlabel="step", ylabel="loss", ylim=(0, None))
    return to_png(figure)


@styled
def usage(counts: Tensor) -> bytes:
    """How often each token takes each code.

    Args:
        counts: (tokens, K) int64.
    """
    share = counts / counts.sum(1, keepdim=True)
    figure, axes = new_figure(1, 1, (10.5, 0.8 + 0.45 * len(counts)))
    axis = axes[0, 0]
    axis.grid(False)
    image = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=max(0.5, float(share.max())), aspect="auto")
    axis.set_yticks(range(len(counts)), [f"token {token}" for token in range(len(counts))])
    axis.set(xlabel="code", xticks=range(0, counts.shape[1], max(1, counts.shape[1] // 32)))
    figure.colorbar(image, ax=axis, label="share", pad=0.01)
    return to_png(figure)


@styled
def actions_by_word(codes: Tensor, rows: Tensor, names: Sequence[str], discrete: bool) -> bytes:
    """Which actions were taken under each of the commonest code words.

    Args:
        codes: (M, tokens) int64.
        rows: (M, A) float: one-hot actions, or real ones.
        names: of the A entries.
        discrete: whether the actions are one-hot: then shares are drawn, else means in standard deviations.
    """
    used = rows.any(0).nonzero().squeeze(1) if discrete else torch.arange(rows.shape[1])
    used = used[:ENTRIES]
    if not discrete:
        deviation = rows.std(0, correction=0)
        rows = (rows - rows.mean(0)) / deviation.where(deviation > 0, 1)
    words, members = common_words(codes, WORDS + 4)
    table = torch.stack([rows[member][:, used].mean(0) for member in members])
    limit = 1.0 if discrete else max(1.0, float(table.abs().max()))
    figure, axes = new_figure(1, 1, (10.5, 1 + 0.36 * len(words)))
    axis = axes[0, 0]
    axis.grid(False)
    image = axis.imshow(
        table.numpy(), cmap="Blues" if discrete else "RdBu_r", vmin=0 if discrete else -limit, vmax=limit, aspect="auto"
    )
    labels = [
        f"{word_name(word)}  ({len(member) / len(codes):.0%})" for word, member in zip(words, members, strict=True)
    ]
    axis.set_yticks(range(len(words)), labels, family="monospace")
    axis.set_xticks(range(len(used)), [names[int(entry)] for entry in used], rotation=45, ha="right")
    axis.set(ylabel="code word (how often)")
    figure.colorbar(image, ax=axis, label="share" if discrete else "mean, standard deviations", pad=0.01)
    return to_png(figure)


@styled
@torch.no_grad()
def traversals(
    model: LatentActionModel, frames: Tensor, next_frames: Tensor, latents: Tensor, labels: Sequence[str]
) -> bytes:
    """Each frame under each latent action: what the model predicts, and below it what that changes.

    Args:
        model: in evaluation mode.
        frames: (R, 3, S, S) uint8.
        next_frames: (R, 3, S, S) uint8: what came.
        latents: (W, tokens, D).
        labels: W names.
    """
    device = next(model.parameters()).device
    now, then = frames.float() / 255, next_frames.float() / 255
    columns = 2 + len(latents)
    figure, axes = new_figure(2 * len(frames), columns, (1.3 * columns, 2.75 * len(frames)))
    for row in range(len(frames)):
        copies = frames[row : row + 1].to(device).expand(len(latents), -1, -1, -1)
        future = model.predict(copies, latents.to(device)).float().cpu()
        changes = (future - now[row]).mean(1)
        limit = float(changes.abs().max().clamp(min=0.02))
        upper, lower = axes[2 * row], axes[2 * row + 1]
        picture(upper[0], now[row], limit)
        lower[0].set_axis_off()
        picture(upper[1], then[row], limit)
        picture(lower[1], (then[row] - now[row]).mean(0), limit)
        for column in range(len(latents)):
            picture(upper[2 + column], future[column], limit)
            picture(lower[2 + column], changes[column], limit)
        lower[1].set_ylabel("change")
    for axis, title in zip(axes[0], ("frame", "what came", *labels), strict=True):
        axis.set_title(title, loc="center", fontsize=9)
    return to_png(figure)


@styled
@torch.no_grad()
def token_effects(model: LatentActionModel, frame: Tensor, latent: Tensor, codes: Tensor, latents: Tensor) -> bytes:
    """What the prediction gains or loses where one token takes another code, the other tokens as they are.

    Args:
        model: in evaluation mode.
        frame: (3, S, S) uint8.
        latent: (tokens, D): the inferred latent action of that frame.
        codes: (M, tokens) int64 of measured transitions.
        latents: (M, tokens, D) of the same: where a token has a code, its latent is that code's.
    """
    device = next(model.parameters()).device
    tokens = len(latent)
    common = [torch.bincount(codes[:, token]).argsort(descending=True, stable=True)[:CODES] for token in range(tokens)]
    shown = [column[torch.isin(column, codes[:, token])].sort().values for token, column in enumerate(common)]
    width = max(map(len, shown))
    figure, axes = new_figure(tokens, width, (10.5, 1.15 + 10.5 / max(width, 6) * tokens))
    own = model.predict(frame[None].to(device), latent[None].to(device)).float().cpu()[0]
    effects = []
    for token in range(tokens):
        swapped = latent.expand(len(shown[token]), -1, -1).clone()
        for place, code in enumerate(shown[token]):
            swapped[place, token] = latents[int((codes[:, token] == code).nonzero()[0]), token]
        future = model.predict(frame[None].to(device).expand(len(swapped), -1, -1, -1), swapped.to(device))
        effects.append((future.float().cpu() - own).mean(1))
    limit = float(torch.cat(effects).abs().max().clamp(min=0.02))
    for token in range(tokens):
        for place, axis in enumerate(axes[token]):
            if place < len(effects[token]):
                picture(axis, effects[token][place], limit)
                axis.set_title(f"code {int(shown[token][place])}", loc="center", fontsize=9)
            else:
                axis.set_axis_off()
        axes[token, 0].set_ylabel(f"token {token}")
    return to_png(figure)
