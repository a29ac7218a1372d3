"""What a trained latent action model says about its frames: one dictionary of numbers, its text and its page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamkernels.covariance import Covariance
from lamkernels.lam import figures, metrics
from lamkernels.lam import fit_nonlinear_figures as own_figures
from lamkernels.lam.data import resize
from lamkernels.lam.files import write_text
from lamkernels.lam.fit_nonlinear_template import TEMPLATE
from lamkernels.lam.fit_report import told_of_actions
from lamkernels.lam.frame_cache import CachedFrames
from lamkernels.lam.linear_metrics import exogenous_leakage, probe_r2
from lamkernels.lam.model import LatentActionModel
from lamkernels.lam.objectives import motion_errors, share_of_copying
from lamkernels.lam.report import page

MEASURED = 20_000  # pairs of a side
BATCH = 128
GIVEN_SIDE = 8  # a probe is given o at so many pixels squared: more of them than pairs would explain anything
EXAMPLES = (0.5, 0.75, 0.95)  # quantiles of the change of the pairs that are drawn
SPREAD = 2.0  # standard deviations to either side
ENOUGH = 0.95  # of the error of a copy: less is a prediction
LITTLE = 0.02  # of it


class Encoded(NamedTuple):
    """Pairs of frames and their latent actions.

    Attributes:
        first: (P,) int64, the first frames.
        latents: (P, tokens, D) float32.
        codes: (P, tokens) int64; None without a codebook.
        change: (P,) float32, mean squared change of the frame, in [0, 1] pixel units.
    """

    first: Tensor
    latents: Tensor
    codes: Tensor | None
    change: Tensor


class Row(NamedTuple):
    """A line of the table, formatted."""

    name: str
    value: str
    note: str


class Line(NamedTuple):
    """A sentence that judges."""

    text: str
    good: bool


@torch.no_grad()
def encode(model: LatentActionModel, cached: CachedFrames, pairs: Tensor) -> Encoded:
    """The latent actions of pairs (P,), of at most :data:`MEASURED` of them, evenly spread."""
    if len(pairs) > MEASURED:
        pairs = pairs[torch.linspace(0, len(pairs) - 1, MEASURED).long()]
    latents, codes, changes = [], [], []
    for _, frame, next_frame in _batches(model, cached, pairs):
        latent, indices = model.encode(frame, next_frame)
        latents.append(latent.float().cpu())
        changes.append(((next_frame.float() - frame.float()) / 255).square().mean((1, 2, 3)).cpu())
        if indices is not None:
            codes.append(indices.cpu())
    shape = (0, model.config.tokens, model.config.latent_dim)
    return Encoded(
        pairs, torch.cat(latents) if latents else torch.zeros(shape), torch.cat(codes) if codes else None,
        torch.cat(changes) if changes else torch.zeros(0),
    )  # fmt: skip


def measure(model: LatentActionModel, cached: CachedFrames, fitted: Encoded, held_out: Encoded) -> dict[str, Any]:
    """The numbers of a fit.

    Args:
        model: in evaluation mode.
        cached: the frames.
        fitted: pairs that it was trained on.
        held_out: other pairs, perhaps none.

    Returns:
        JSON: "measured" (pairs of either side); "prediction" "on" the held-out pairs (the fitted ones where there are
        none), "under_inferred" latent actions, "under_another" pair's, and by a "copy" of the frame: the "error" of
        :func:`lamkernels.lam.objectives.relative_motion_error`, "mse" in [0, 1] pixel units and "psnr" in dB; "codes"
        (:class:`lamkernels.lam.metrics.CodeUsage`, None without a codebook); "actions" as in the report of the linear
        model, given o at :data:`GIVEN_SIDE` pixels, with "probe", the accuracy of a linear classifier where actions
        are integers; None without actions; "exogenous": "leakage", the share of the next exogenous state that z
        explains, given o and the state before, and the same "held_out", by a ridge probe (None without such pairs);
        None where no state is known.
    """
    side, name = (held_out, "held_out") if len(held_out.first) else (fitted, "fitted")
    return {
        "measured": {"fitted": len(fitted.first), "held_out": len(held_out.first)},
        "given_side": GIVEN_SIDE,
        "prediction": {"on": name, **_prediction(model, cached, side)},
        "codes": None if side.codes is None else _usage(side.codes, model.config.codebook_size),
        "actions": _actions(cached, fitted, held_out),
        "exogenous": _exogenous(cached, fitted, held_out),
    }


@torch.no_grad()
def _prediction(model: LatentActionModel, cached: CachedFrames, side: Encoded) -> dict[str, Any]:
    other = side.latents.roll(len(side.latents) // 2, 0)
    names, entries = ("under_inferred", "under_another", "copy"), 3 * model.config.size**2
    found: dict[str, list[Tensor]] = {name: [] for name in names}  # (2, B) of each batch: error, and that of a copy
    squares = dict.fromkeys(names, 0.0)
    for rows, frame, next_frame in _batches(model, cached, side.first):
        now, then = frame.float() / 255, next_frame.float() / 255
        for name, latents in (("under_inferred", side.latents), ("under_another", other), ("copy", None)):
            predicted = now if latents is None else model.predict(frame, latents[rows].to(now)).float().clamp(0, 1)
            errors = motion_errors(predicted, then, now, model.config.motion_weight)
            found[name].append(torch.stack(errors).double().cpu())
            squares[name] += float((predicted - then).double().square().sum()) / (entries * len(side.first))
    measures = {}
    for name in names:
        error, copying = torch.cat(found[name], 1)
        measures[name] = {
            "error": float(share_of_copying(error, copying, entries)),  # one ratio: a batch may stand still
            "mse": squares[name],
            "psnr": -10 * math.log10(max(squares[name], 1e-12)),
        }
    return measures


def _batches(model: LatentActionModel, cached: CachedFrames, pairs: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    device, data = next(model.parameters()).device, cached.data
    for start in range(0, len(pairs), BATCH):
        first = pairs[start : start + BATCH]
        yield slice(start, start + BATCH), data.frames[first].to(device), data.frames[first + data.lag].to(device)


def _usage(codes: Tensor, codebook_size: int) -> dict[str, Any]:
    usage = metrics.code_usage(codes, codebook_size)
    return asdict(usage) | {"counts": usage.counts.tolist()}


def _actions(cached: CachedFrames, fitted: Encoded, held_out: Encoded) -> dict[str, Any] | None:
    if cached.action_rows is None:
        return None
    rows = cached.action_rows
    known = [~rows[side.first].isnan().any(1) for side in (fitted, held_out)]
    moments = [
        _moments(cached, side, kept, rows[side.first]) for side, kept in zip((fitted, held_out), known, strict=True)
    ]
    if moments[0].count < 2:
        return None
    told = told_of_actions(moments[0], moments[1] if moments[1].count > 1 else None)
    told["unexplained_held_out"] = None if moments[1].count < 2 else 1 - probe_r2(moments[0], moments[1], "z", z="a")
    train, test = (side.latents[kept].flatten(1) for side, kept in zip((fitted, held_out), known, strict=True))
    labels, test_labels = (
        cached.data.actions[s.first[kept]] for s, kept in zip((fitted, held_out), known, strict=True)
    )
    probe = None
    if cached.data.action_names and len(test):
        result = metrics.linear_probe(train, labels, test, test_labels)
        probe = {"accuracy": result.accuracy, "majority_accuracy": result.majority_accuracy}
    return told | {"probe": probe}


def _exogenous(cached: CachedFrames, fitted: Encoded, held_out: Encoded) -> dict[str, Any] | None:
    state, lag = cached.exogenous, cached.data.lag
    if state is None:
        return None
    known = ~state.isnan().any(1)
    if int(known.sum()) < 2:
        return None
    state = state - state[known].mean(0)
    state = state / state[known].square().mean().sqrt().clamp(min=1e-12)  # of the scale of the pixels beside it
    moments = []
    for side in (fitted, held_out):
        now, then = (state[side.first + step] for step in (0, lag))
        moments.append(_moments(cached, side, ~(now.isnan() | then.isnan()).any(1), then, now))
    if moments[0].count < 2:
        return None
    train, test = moments
    return {
        "leakage": exogenous_leakage(train, eps="a"),
        "held_out": probe_r2(train, test, "a") if test.count > 1 else None,
    }


def _moments(
    cached: CachedFrames, side: Encoded, kept: Tensor, asked: Tensor, given: Tensor | None = None
) -> Covariance:
    """Of the kept (P,) pairs of a side: o, the frame at a few pixels and what else is given; z; and what is asked."""
    given = torch.zeros(len(kept), 0) if given is None else given
    latent = side.latents[0].numel() if len(side.latents) else 1
    sums = Covariance({"o": 3 * GIVEN_SIDE**2 + given.shape[1], "z": latent, "a": asked.shape[1]}, precision="exact")
    for part in torch.split(kept.nonzero().squeeze(1), BATCH):
        o = resize(cached.data.frames[side.first[part]], GIVEN_SIDE).flatten(1).float() / 255
        sums.update({"o": torch.cat([o, given[part]], 1), "z": side.latents[part].flatten(1), "a": asked[part]})
    return sums


def verdict(results: dict[str, Any]) -> list[Line]:
    """What to make of the numbers, whichever way they went."""
    prediction, codes, actions, exogenous = (results[name] for name in ("prediction", "codes", "actions", "exogenous"))
    error, other = (prediction[name]["error"] for name in ("under_inferred", "under_another"))
    pairs = "held-out pairs" if prediction["on"] == "held_out" else "the pairs that it was trained on"
    moving = "where pixels that move count most"
    lines = []
    if error < ENOUGH:
        text = f"On {pairs} the prediction makes {error:.1%} of the error of a copy of the frame, {moving}."
    else:
        text = (
            f"On {pairs} the prediction makes {error:.1%} of the error of a copy of the frame, {moving}: it is no "
            "better. More steps, a larger lag, so that more moves, or more data may help."
        )
    lines.append(Line(text, error < ENOUGH))
    if other > error + LITTLE:
        text = f"Under the latent action of another pair it makes {other:.1%}: latent actions matter."
    else:
        text = f"Under the latent action of another pair it makes {other:.1%}: latent actions hardly matter."
    lines.append(Line(text, other > error + LITTLE))
    if codes is not None and codes["words"] == 1:
        lines.append(Line("All pairs have the same codes: the codebook has collapsed.", False))
    if exogenous is not None:
        leakage = _leakage(exogenous)
        lines.append(Line(f"They explain {max(leakage, 0):.0%} of what the exogenous state does next, given the frame "
                          "and the state before: that leaks.", leakage < 0.1))  # fmt: skip
    if actions is None and exogenous is None:
        lines.append(Line("The data hold no actions, so nothing can be measured of what the latent actions say: judge "
                          "by the figures.", True))  # fmt: skip
    elif actions is not None:
        recovery, unexplained = _told(actions)
        lines.append(
            Line(f"They explain {max(recovery, 0):.0%} of the action, given the frame; the action leaves "
                 f"{min(unexplained, 1):.0%} of them unexplained, and exogenous leakage is in there.",
                 recovery > 0.1)
        )  # fmt: skip
    return lines


def _told(actions: dict[str, Any]) -> tuple[float, float]:
    """Recovery and what the action leaves unexplained: held out where there are such pairs."""
    if actions["held_out"] is None:
        return actions["recovery"], actions["unexplained_latent"]
    return actions["held_out"], actions["unexplained_held_out"]


def _leakage(exogenous: dict[str, Any]) -> float:
    leakage: float = exogenous["leakage" if exogenous["held_out"] is None else "held_out"]
    return leakage


def table(results: dict[str, Any]) -> list[Row]:
    """The numbers, formatted."""
    prediction, codes, actions, loss = (results[name] for name in ("prediction", "codes", "actions", "loss"))
    on = "held-out pairs" if prediction["on"] == "held_out" else "fitted pairs"
    rows = [Row("training error", f"{loss['last']:.3f}", f"at the end; {loss['first']:.3f} at the start; 1 is a copy")]
    for name, what in (
        ("under_inferred", "prediction under the inferred latent action"),
        ("under_another", "prediction under that of another pair"),
        ("copy", "copy of the frame"),
    ):
        rows.append(
            Row(what, f"{prediction[name]['error']:.3f}", f"error, {on}; PSNR {prediction[name]['psnr']:.2f} dB")
        )
    if codes is not None:
        size = results["config"]["model"]["codebook_size"]
        rows += [
            Row("codes in use", f"{codes['used']} of {size}", on),
            Row("code perplexity", f"{codes['perplexity']:.2f}", f"at most {size}"),
            Row("code words", f"{codes['words']}", "combinations of the tokens' codes"),
        ]
    if actions is not None:
        recovery, unexplained = _told(actions)
        of_fitted = f"on the fitted pairs {actions['recovery']:.3f} and {actions['unexplained_latent']:.3f}"
        on = "no held-out pairs" if actions["held_out"] is None else f"held out; {of_fitted}"
        rows += [
            Row("action recovery", f"{recovery:.3f}", f"share of the action that z explains; {on}"),
            Row("z that the action leaves unexplained", f"{unexplained:.3f}", "leakage is in there"),
        ]
        if actions["probe"] is not None:
            note = f"held out; the commonest action alone: {actions['probe']['majority_accuracy']:.1%}"
            rows.append(Row("actions named by a linear probe", f"{actions['probe']['accuracy']:.1%}", note))
    if results["exogenous"] is not None:
        known = results["exogenous"]
        on = (
            "no held-out pairs"
            if known["held_out"] is None
            else f"held out; on the fitted pairs {known['leakage']:.3f}"
        )
        rows.append(
            Row("exogenous leakage", f"{_leakage(known):.3f}", f"share of the next state that z explains; {on}")
        )
    return rows


def summary(results: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [
        f"{results['pairs']['fitted']} pairs fitted, {results['pairs']['held_out']} held out, "
        f"{results['seconds']:.1f} s",
        *(f"{row.name}: {row.value} ({row.note})" for row in table(results)),
        *(line.text for line in verdict(results)),
        *(f"skipped {source}: {reason}" for source, reason in results["skipped"]),
    ]
    return "\n".join(lines)


def write_page(
    path: Path,
    results: dict[str, Any],
    model: LatentActionModel,
    cached: CachedFrames,
    side: Encoded,
    curves: Mapping[str, list[float]],
) -> None:
    """Writes ``report.html``, one file with its figures inside.

    Args:
        path: of the page.
        results: of the fit.
        model: in evaluation mode.
        cached: the frames.
        side: the pairs that are drawn from.
        curves: "step" and the losses at those steps.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
        OSError: the page cannot be written.
    """
    data = cached.data
    order = side.change.argsort(stable=True)
    drawn = [int(order[min(int(share * len(order)), len(order) - 1)]) for share in EXAMPLES]
    frames, next_frames = (data.frames[side.first[drawn] + lag] for lag in (0, data.lag))
    latents, labels = _columns(side)
    images = {
        "traversals": own_figures.traversals(model, frames, next_frames, latents, labels),
        "predictions": figures.predictions(model, frames, next_frames, [_caption(cached, side, i) for i in drawn]),
        "losses": own_figures.losses(curves),
    }
    if side.codes is not None:
        images["usage"] = own_figures.usage(torch.tensor(results["codes"]["counts"]))
        if model.config.tokens > 1:
            images["tokens"] = own_figures.token_effects(
                model, frames[0], side.latents[drawn[0]], side.codes, side.latents
            )
        if results["actions"] is not None and cached.action_rows is not None:
            rows = cached.action_rows[side.first]
            known, names = ~rows.isnan().any(1), data.action_names
            entries = [*names, *(f"entry {i}" for i in range(len(names), rows.shape[1]))]
            if bool(known.any()):
                images["actions"] = own_figures.actions_by_word(side.codes[known], rows[known], entries, bool(names))
    sources = results["config"]["frames"]["sources"]
    title = Path(sources[0]).name if len(sources) == 1 else f"{len(cached.parts)} sources"
    write_text(
        path, page(TEMPLATE, images, results=results, rows=table(results), verdict=verdict(results), title=title)
    )


def _columns(side: Encoded) -> tuple[Tensor, list[str]]:
    """Latent actions (W, tokens, D) that are worth drawing, and their names."""
    if side.codes is not None:
        words, members = figures.common_words(side.codes, own_figures.WORDS)
        shares = [
            f"{figures.word_name(w)}\n{len(m) / len(side.codes):.0%}" for w, m in zip(words, members, strict=True)
        ]
        return torch.stack([side.latents[int(member[0])] for member in members]), shares
    flat = side.latents.flatten(1).double()
    mean = flat.mean(0)
    _, deviations, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    ends, labels = [], []
    for number in range(min(own_figures.WORDS // 2, len(deviations))):
        step = SPREAD * deviations[number] / math.sqrt(len(flat)) * directions[number]
        for sign, name in ((-1, "−"), (1, "+")):
            ends.append((mean + sign * step).view(side.latents.shape[1:]).float())
            labels.append(f"direction {number + 1}\n{name}{SPREAD:g} σ")
    return torch.stack(ends), labels


def _caption(cached: CachedFrames, side: Encoded, number: int) -> str:
    """The action of a pair where it has a name, else the file."""
    first = int(side.first[number])
    action = int(cached.data.actions[first])
    if action >= 0 and cached.data.action_names:
        return cached.data.action_names[action]
    part = next(part for part in cached.parts if part.start <= first < part.start + part.count)
    return Path(part.source).stem[:18]
