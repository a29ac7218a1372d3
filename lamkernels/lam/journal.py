"""Rows of an experiment that are kept as they are made: a run that was stopped goes on behind the last one."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lamkernels.lam.effects import effects
from lamkernels.lam.experiments import to_csv, write
from lamkernels.lam.files import write_text
from lamkernels.lam.workers import each

Row = dict[str, Any]
P = TypeVar("P")


def kept_rows(
    controls: Any, points: Sequence[P], run: Callable[[P], Row], journal: Path | None = None,
    *, processes: int = 1, progress: bool = False,
) -> list[Row]:  # fmt: skip
    """A row for each point, in their order, each made on one thread: the same controls give the same numbers.

    Args:
        controls: dataclass of everything that the rows depend on.
        points: dataclasses, no two equal.
        run: makes the row of a point, of what JSON can hold, and depends on nothing but the point; several processes
            get a pickle of it each.
        journal: where each row is kept as a line of JSON as soon as it is there; rows that an earlier run with the same
            controls left there are not made again.
        processes: that make rows; the rows do not depend on it, a point has seeds of its own.
        progress: show a progress bar.

    Raises:
        ChildProcessError: one of the processes was killed.
        ValueError: the journal has rows of other controls.
    """
    from tqdm import tqdm

    head = json.dumps(asdict(controls))
    known: dict[str, Row] = {}
    if journal is not None:
        known = _read(journal, head)
        if not known:
            write_text(journal, head + "\n")
    keys = [_key(point) for point in points]
    left = [point for key, point in zip(keys, points, strict=True) if key not in known]
    with (
        contextlib.closing(each(run, left, processes)) as made,
        tqdm(total=len(points), initial=len(known), unit="model", disable=not progress) as bar,
    ):
        for point, row in made:
            known[_key(point)] = row
            if journal is not None:
                with journal.open("a") as lines:
                    lines.write(json.dumps([_key(point), row]) + "\n")
            bar.update()
    return [known[key] for key in keys]


def _key(point: Any) -> str:
    return json.dumps(asdict(point))


def write_experiments(
    names: Sequence[str], out: Path, controls: Mapping[str, Any], rows_of: Callable[..., list[Row]],
    draw: Mapping[str, Callable[[list[Row]], bytes]], *, quick: bool, processes: int = 1, prefix: str = "",
) -> None:  # fmt: skip
    """Writes ``PREFIXNAME.csv``, ``.png`` and, with its controls, ``.json`` for each experiment.

    While one runs, its rows are in ``.jsonl`` there. What its remedies change is in ``PREFIXNAME-effects.csv``.

    Args:
        names: of ``controls``.
        out: folder.
        controls: of each experiment, with a method ``quick()``.
        rows_of: makes the rows, by :func:`kept_rows`, of its arguments controls, journal, ``processes`` and
            ``progress``.
        draw: makes the figure of each experiment.
        quick: fewer and smaller.
        processes: that make rows.
        prefix: of the names of the files.

    Raises:
        OSError: a file cannot be written.
        ValueError: a journal has rows of other controls.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        start = time.perf_counter()
        place = out / f"{prefix}{name}"
        journal = place.with_name(f"{place.name}.jsonl")
        chosen = controls[name].quick() if quick else controls[name]
        rows = rows_of(chosen, journal, processes=processes, progress=sys.stderr.isatty())
        write_text(place.with_name(f"{place.name}.json"), json.dumps(asdict(chosen), indent=1) + "\n")
        changes = effects(rows)
        if changes:
            write_text(place.with_name(f"{place.name}-effects.csv"), to_csv(changes))
        write(place, rows, draw[name](rows), start)
        journal.unlink()


def _read(journal: Path, head: str) -> dict[str, Row]:
    """The rows of an earlier run with these controls; a line that was cut off is left out."""
    if not journal.exists():
        return {}
    first, *lines = journal.read_text().split("\n")
    if first != head and len(lines) > 1:
        raise ValueError(f"{journal} has rows of a run with other controls: finish that, or name another folder")
    if first != head:
        return {}
    whole = lines[:-1]  # what follows the last newline was not finished
    if lines[-1:] != [""]:
        write_text(journal, "\n".join([first, *whole, ""]))
    return dict(json.loads(line) for line in whole)
