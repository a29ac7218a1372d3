"""The tables of the pages on frames and networks are those of the committed results, which agree with one another."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lamkernels.lam.collapse import interval
from lamkernels.lam.effects import effects
from lamkernels.lam.nonlinear_experiments import REMEDIES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "frames-lam.md").read_text()
NETWORKS = (DOCS / "nonlinear-lam.md").read_text()
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


def rows_of(page, beginning):
    """The rows of the first table after some text, below its head."""
    rows = []
    for line in page[page.index(beginning) :].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            return rows[2:]
    raise AssertionError(beginning)


def table(beginning):
    """The cells of the first table after some text, by the first cell of each row."""
    return {first: cells for first, *cells in rows_of(PAGE, beginning)}


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


def of(measure, *bottlenecks):
    return [{"measure": measure, "bottleneck": name} for name in bottlenecks]


def at(*measures_and_ratios):
    return [{"measure": measure, "ratio": ratio} for measure, ratio in measures_and_ratios]


LEVELS = {ratio: {"ratio": float(ratio)} for ratio in ("0.125", "0.25", "0.5", "0.7", "1.4", "2.5", "6", "16")}
NAMES = {  # how the labels of rows begin
    label: {"bottleneck": name}
    for label, name in {
        "linear": "linear", "continuous": "none", "Gaussian": "gaussian", "VQ, straight": "vq", "VQ, code": "gradient",
        "VQ, rotation": "rotation", "VQ, noise": "noise", "VQ, residual": "residual", "SimVQ": "simvq", "FSQ": "fsq",
    }.items()
}  # fmt: skip
BELOW = [{"ratio": 0.25} | row for row in of("leakage_features", "none", "linear")]
ABOVE = [{"ratio": 4.0} | row for m in ("leakage", "recovery_features") for row in of(m, "none", "linear")]


@pytest.mark.parametrize(
    ("page", "beginning", "name", "row", "columns"),
    [
        (PAGE, "## The noise level", "frames-noise", LEVELS,
         [column for m in ("leakage", "recovery_features") for column in of(m, "linear", "none", "vq")]),
        (PAGE, "## Noise that depends", "frames-dependence", dict(enumerate(BELOW + ABOVE)),
         [{"coupling": c} for c in (0.0, 0.4, 0.8, 1.0)]),
        (PAGE, "## The bottleneck changes", "frames-bottlenecks", NAMES,
         at(*((m, ratio) for ratio in (0.25, 4.0) for m in ("leakage", "recovery_features")))),
        (NETWORKS, "## The noise level", "noise", LEVELS,
         [column for m in ("leakage", "recovery") for column in of(m, "linear", "none", "vq", "fsq")]),
        (NETWORKS, "## Every remedy works", "remedies", dict(enumerate({"remedy": r} for r in REMEDIES)),
         [column for b in BOTTLENECKS for m in ("leakage", "recovery") for column in of(m, b)]),
        (NETWORKS, "## The bottleneck changes", "bottlenecks", NAMES, at(("recovery", 0.25), ("leakage", 16.0))),
    ],
    ids=["frames, noise", "frames, dependence", "frames, bottlenecks", "noise", "remedies", "bottlenecks"],
)  # fmt: skip
def test_means_and_intervals(page, beginning, name, row, columns):
    rows, wrong = read(name), []
    for number, (first, *cells) in enumerate(rows_of(page, beginning)):
        label = next((known for known in row if first.startswith(str(known))), number)
        for column, cell in zip(columns, cells, strict=True):
            wanted = row[label] | column
            measure = wanted.pop("measure")
            found = [line[measure] for line in rows if wanted.items() <= line.items()]
            assert len(found) == 3, (first, wanted)
            shown = [float(number) for number in cell.replace("−", "-").split(" ± ")]
            half = 0.5 * 10.0 ** -len(cell.split(" ")[0].partition(".")[2]) if "." in cell else 1e-3
            if any(abs(a - b) > half + 1e-9 for a, b in zip(shown, interval(found), strict=False)):
                wrong.append((first, wanted, cell, interval(found)))
    assert not wrong
