"""What each remedy changes, with its sign and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamkernels.lam.collapse import interval

Row = dict[str, Any]
SAME = ("seed", "ratio", "coupling", "difficulty")  # what two rows share that are compared, as far as they have it
MEASURES = ("leakage", "leakage_features", "recovery", "recovery_features", "inconsistency")


def effects(rows: Sequence[Row]) -> list[Row]:
    """Each measure under a remedy less the same without one, of the same seed: mean and half of a 95 % interval.

    Pairs of one seed share their frames, so what differs between seeds alone is not in the interval (Student's t).

    Args:
        rows: of models, with "remedy", "bottleneck" and "seed", and for each seed one with the remedy "none".

    Returns:
        A row for each bottleneck and remedy, with the measures that the rows have and NAME_interval of each.
    """
    measures = [name for name in MEASURES if all(name in row for row in rows)]
    found = []
    for bottleneck in dict.fromkeys(row["bottleneck"] for row in rows):
        own = [row for row in rows if row["bottleneck"] == bottleneck]
        without = {_key(row): row for row in own if row["remedy"] == "none"}
        for remedy in dict.fromkeys(row["remedy"] for row in own if row["remedy"] != "none"):
            result: Row = {"bottleneck": bottleneck, "remedy": remedy}
            for name in measures:
                change = [row[name] - without[_key(row)][name] for row in own if row["remedy"] == remedy]
                result[name], result[f"{name}_interval"] = interval(change)
            found.append(result)
    return found


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in SAME)
