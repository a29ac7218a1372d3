"""The tables of remedies on docs/frames-lam.md are those of the committed results, and these agree with one another."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lamkernels.lam.collapse import interval
from lamkernels.lam.effects import effects

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "frames-lam.md").read_text()
GAMES = ("frames-remedies", "frames-pong-remedies", "frames-control-remedies")
SECTIONS = ("At a ratio of 4, where a model", "## The same on Pong", "## A task of dm_control")
BOTTLENECKS = ("none", "vq")  # as the CSV names the continuous latent and VQ


def read(name):
    def parsed(cell):
        try:
            return float(cell)
        except ValueError:
            return cell

    with (DOCS / "nonlinear-lam" / f"{name}.csv").open() as lines:
        return [{key: parsed(cell) for key, cell in row.items()} for row in csv.DictReader(lines)]


def table(beginning):
    """The cells of the first table after some text, by the first cell of each row."""
    lines = iter(PAGE[PAGE.index(beginning) :].splitlines())
    rows = {}
    for line in lines:
        if line.startswith("|"):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[first] = cells
        elif rows:
            return dict(list(rows.items())[2:])
    raise AssertionError(beginning)


def written(number):
    text = f"{number:.2f}".replace("-", "−")
    return text.removeprefix("−") if text == "−0.00" else text


def signed(number):
    text = written(number)
    return text if text[0] == "−" or text == "0.00" else f"+{text}"


@pytest.mark.parametrize(("game", "section"), [*zip(GAMES, SECTIONS, strict=True)])
def test_remedies(game, section):
    rows = read(game)
    expected = {
        str(remedy): [
            " ± ".join(
                written(number)
                for number in interval(
                    [row[name] for row in rows if row["remedy"] == remedy and row["bottleneck"] == bottleneck]
                )
            )
            for bottleneck in BOTTLENECKS
            for name in ("leakage", "recovery_features")
        ]
        for remedy in dict.fromkeys(row["remedy"] for row in rows if row["bottleneck"] == "vq")
    }
    assert table(section) == expected


@pytest.mark.parametrize("game", GAMES)
def test_effects_are_those_of_the_rows(game):
    for found, row in zip(effects(read(game)), read(f"{game}-effects"), strict=True):
        assert [found.pop(name) for name in ("bottleneck", "remedy")] == [row.pop("bottleneck"), row.pop("remedy")]
        assert found == pytest.approx(row, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("beginning", "measure"),
    [
        ("First leakage by the\nlinear probe", "leakage"),
        ("Then recovery by the probe on features:", "recovery_features"),
    ],
    ids=["leakage", "recovery"],
)
def test_what_each_remedy_changes(beginning, measure):
    def key(row):
        return row["remedy"] if "agent" not in row["remedy"] else "agent region or mask", row["bottleneck"]

    def cell(row):
        return f"{signed(row[measure])} ± {written(row[f'{measure}_interval'])}"

    found = [{key(row): cell(row) for row in read(f"{game}-effects")} for game in GAMES]
    rows = table(beginning)
    assert rows == {remedy: [game.get((remedy, b), "") for game in found for b in BOTTLENECKS] for remedy in rows}
    assert set(rows) == {remedy for game in found for remedy, _ in game}
