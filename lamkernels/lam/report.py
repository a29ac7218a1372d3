"""``report.html``: one file, figures inside."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lamkernels.lam import figures
from lamkernels.lam.report_template import BASE, TEMPLATE
from lamkernels.lam.train import Trainer

EXAMPLES = 4


class Row(NamedTuple):
    """A line of the headline table, formatted."""

    name: str
    stock: str
    fused: str
    ratio: str
    note: str


def headline(results: dict[str, Any]) -> list[Row]:
    """The numbers that matter, stock beside fused; a ratio above 1 is in favour of the fused module."""
    steps = results["step_time_ms"]
    time = steps["stock"]["median"], steps["fused"]["median"]
    rows = [_ratio_row("training step", "ms", *time, "median, interleaved")]
    for shape, label in (("training_shape", "bottleneck"), ("tokenizer_shape", "large bottleneck")):
        costs = results["bottleneck"][shape]
        size = f"N = {costs['rows']}, K = {costs['codebook_size']}, D = {costs['dim']}"
        for key, what, unit, note in (
            ("time_ms", "time", "ms", f"forward + backward, {size}"),
            ("peak_extra_mib", "peak memory", "MiB", "beyond its input"),
            ("operators", "operators", "", "of torch, called on the host"),
            ("kernel_launches", "kernel launches", "", "on the GPU"),
        ):
            stock, fused = costs["stock"][key], costs["fused"][key]
            if stock is not None:
                rows.append(_ratio_row(f"{label}, {what}", unit, stock, fused, note))
    usage, recovery = results["code_usage"], results["action_recovery"]
    size = usage["stock"]["codebook_size"]

    def pair(name: str, text: Callable[[str], str], note: str) -> Row:
        return Row(name, text("stock"), text("fused"), "", note)

    majority = recovery["stock"]["majority_accuracy"]
    return [
        *rows,
        pair("codes in use", lambda which: f"{usage[which]['used']} of {size}", "held-out transitions"),
        pair("code perplexity", lambda which: f"{usage[which]['perplexity']:.2f}", f"at most {size}"),
        pair(
            "actions recovered from codes",
            lambda which: f"{recovery[which]['accuracy']:.1%}",
            f"held out; the commonest action alone: {majority:.1%}",
        ),
    ]


def verdict(results: dict[str, Any]) -> str:
    """What to make of the curves, whichever way they went."""
    curves, single = (results["agreement"][key] for key in ("curves", "float32_curves"))
    timed = (
        f"In float32, as models are trained, they differ by at most {single['max_relative_difference']:.1e} over the "
        f"{single['steps']} steps that were timed."
    )
    if curves["coincide"]:
        return (
            f"The two loss curves coincide: over {curves['steps']} steps in float64 they differ by at most "
            f"{curves['max_relative_difference']:.1e} of the loss. {timed}"
        )
    return (
        f"The two loss curves part: in float64 they coincide to {curves['tolerance']:.0e} of the loss for "
        f"{curves['first_step_apart']} of {curves['steps']} steps and differ by at most "
        f"{curves['max_relative_difference']:.1e}, more than rounding explains. {timed}"
    )


def render(results: dict[str, Any], trainer: Trainer, codes: Tensor, pairs: Tensor, held_out: int) -> str:
    """The report of a demonstration.

    Args:
        results: of the demonstration.
        trainer: of the fused model.
        codes: (P, tokens) int64, of all transitions.
        pairs: (P,) int64, their first frames.
        held_out: the first held-out transition.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    model, data = trainer.model.eval(), trainer.data
    test, test_codes = pairs[held_out:], codes[held_out:]
    actions, names = data.actions[test], data.action_names
    chosen = _examples(data.frames, test, actions, len(names))
    frames, next_frames = data.frames[test[chosen]], data.frames[test[chosen] + 1]
    played = [names[int(actions[i])] for i in chosen]
    images = {
        "curves": figures.curves(results),
        "usage": figures.usage(results, test_codes, actions),
        "predictions": figures.predictions(model, frames, next_frames, played),
        "codes": figures.what_codes_do(model, frames[1], next_frames[1], test_codes, actions, names),
    }
    return page(TEMPLATE, images, results=results, rows=headline(results), verdict=verdict(results))


def page(template: str, images: Mapping[str, bytes], **values: Any) -> str:
    """A self-contained page from a template that extends "base"; its ``images`` are base64 of the PNGs.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    from jinja2 import DictLoader, Environment

    loader = DictLoader({"base": BASE, "page": template})
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    encoded = {name: base64.b64encode(png).decode("ascii") for name, png in images.items()}
    return environment.get_template("page").render(images=encoded, **values)


def _examples(frames: Tensor, test: Tensor, actions: Tensor, classes: int) -> list[int]:
    """For each action the transition whose visible change is the median of that action's, then repeat the last ones."""
    change = (frames[test + 1].int() - frames[test].int()).abs().flatten(1).sum(1)
    chosen = []
    for action in range(classes):
        members = (actions == action).nonzero().squeeze(1)
        if len(members):
            chosen.append(int(members[change[members].argsort(stable=True)[len(members) // 2]]))
    return chosen[:EXAMPLES]


def _ratio_row(name: str, unit: str, stock: float, fused: float, note: str) -> Row:
    ratio = f"{stock / fused:.2f}×" if fused else ""
    return Row(name, _quantity(stock, unit), _quantity(fused, unit), ratio, note)


def _quantity(value: float, unit: str) -> str:
    number = f"{value}" if isinstance(value, int) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return f"{number} {unit}".strip()
