"""``python -m lamkernels.lam.experiments [names] --out DIR``: why linear latent actions fail, and what prevents it.

Each experiment writes a CSV with all its numbers and a figure, from its controls alone: the same seed, the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from lamkernels.lam import experiment_figures, linear_experiments
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
    parser = argparse.ArgumentParser(
        prog="python -m lamkernels.lam.experiments",
        description="The linear latent action model on synthetic worlds: NAME.csv and NAME.png for each experiment.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("linear-lam"), metavar="DIR", help="default: ./linear-lam")
    parser.add_argument("--quick", action="store_true", help="fewer points, samples and steps: seconds")
    parser.add_argument("--seed", type=int, default=0, help="of worlds, samples and training; default: %(default)s")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"NAME is {unknown[0]!r}; it must be one of {', '.join(map(repr, NAMES))}")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; it must be at least 0")
    try:
        run(options.names or NAMES, options.out, quick=options.quick, seed=options.seed)
    except (ModuleNotFoundError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


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
    if find_spec("matplotlib") is None:  # before the work, not after it
        raise ModuleNotFoundError("the figures need matplotlib; pip install 'lamkernels[demo]'")
    controls = {name: replace(values.quick() if quick else values, seed=seed) for name, values in CONTROLS.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            start = time.perf_counter()
            if name == "controls":
                rows = [{"figure": figure, **asdict(values)} for figure, values in controls.items()]
                png = experiment_figures.controls(rows)
            else:
                compute, draw = EXPERIMENTS[name]
                rows = compute(controls[name])
                png = draw(rows)
            write_text(out / f"{name}.csv", to_csv(rows))
            with replacing(out / f"{name}.png") as path:
                path.write_bytes(png)
            print(f"{out / name}.csv, .png: {len(rows)} rows, {time.perf_counter() - start:.1f} s")
    finally:
        torch.set_num_threads(threads)


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
