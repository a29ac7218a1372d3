"""``python -m lamkernels.lam.experiments [names] --out DIR``: why linear latent actions fail, and what prevents it.

Each experiment writes a CSV with all its numbers and a figure, from its controls alone: the same seed, the same bytes.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lamkernels.lam import commands, experiment_figures, linear_experiments
from lamkernels.lam.files import replacing, write_text
from lamkernels.lam.linear_experiments import CONTROLS, Controls, Row

EXPERIMENTS: dict[str, tuple[Callable[[Controls], list[Row]], Callable[[list[Row]], bytes]]] = {
    "noise": (linear_experiments.noise, experiment_figures.noise),
    "capacity": (linear_experiments.capacity, experiment_figures.capacity),
    "remedies": (linear_experiments.remedies, experiment_figures.remedies),
    "dependence": (linear_experiments.dependence, experiment_figures.dependence),
}
NAMES = (*EXPERIMENTS, "controls")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiments that are named, all without a name; returns the exit status."""
    parser = commands.parser(
        "lamkernels.lam.experiments",
        "The linear latent action model on synthetic worlds: NAME.csv and NAME.png for each experiment.",
        "linear-lam",
        NAMES,
    )
    parser.add_argument("--seed", type=int, default=0, help="of worlds, samples and training; default: %(default)s")
    options = parser.parse_args(argv)
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; it must be at least 0")
    return commands.status(parser, lambda: run(options.names, options.out, quick=options.quick, seed=options.seed))


def run(names: Sequence[str], out: Path, *, quick: bool = False, seed: int = 0) -> None:
    """Writes ``NAME.csv`` and ``NAME.png`` for each experiment.

    One thread does it: the matrices are small, and sums then have one order on every machine.

    Args:
        names: of :data:`NAMES`; "controls" is the table of what each of the others is made with.
        out: folder.
        quick: fewer points, samples and steps.
        seed: of worlds, samples and training.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    commands.need("matplotlib")
    controls = {name: replace(values.quick() if quick else values, seed=seed) for name, values in CONTROLS.items()}
    with commands.one_thread():
        for name in names:
            start = time.perf_counter()
            if name == "controls":
                rows = [{"figure": figure, **asdict(values)} for figure, values in controls.items()]
                png = experiment_figures.controls(rows)
            else:
                compute, draw = EXPERIMENTS[name]
                rows = compute(controls[name])
                png = draw(rows)
            write(out / name, rows, png, start)


def write(place: Path, rows: Sequence[Row], png: bytes, start: float) -> None:
    """Writes the rows of an experiment to ``place``.csv and its figure to ``place``.png, and says so.

    Args:
        place: folder and name.
        rows: see :func:`to_csv`.
        png: the figure.
        start: ``time.perf_counter()`` at the start of the experiment.
    """
    write_text(place.with_name(f"{place.name}.csv"), to_csv(rows))
    with replacing(place.with_name(f"{place.name}.png")) as path:
        path.write_bytes(png)
    print(f"{place}.csv, .png: {len(rows)} rows, {time.perf_counter() - start:.1f} s")


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, columns in the order in which they first appear.

    Numbers have 8 digits, and 0 stands for what is below 1e-12, which is rounding; tuples are separated by spaces.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return format(value if abs(value) >= 1e-12 else 0.0, ".8g")
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
