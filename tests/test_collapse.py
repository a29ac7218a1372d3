"""The collapse experiment: its numbers are those of its runs, the same for one seed."""

import csv
import math
from dataclasses import replace

import pytest
import torch

from lamkernels.lam import collapse

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = collapse.Controls().quick()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of the quick run, and its rows by file."""
    out = tmp_path_factory.mktemp("collapse") / "new"
    assert collapse.main(["--quick", "--out", str(out)]) == 0
    rows = {}
    for name in ("curves", "summary"):
        with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            rows[name] = list(csv.DictReader(file))
    return out, rows


def test_every_remedy_is_measured_through_training(results):
    out, rows = results
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    seen = {(row["remedy"], int(row["seed"]), int(row["step"])) for row in rows["curves"]}
    steps = range(QUICK.every, QUICK.steps + 1, QUICK.every)
    assert seen == {(remedy, seed, step) for remedy in collapse.REMEDIES for seed in (0, 1) for step in steps}
    for row in rows["curves"]:
        usage, perplexity = float(row["usage"]), float(row["perplexity"])
        assert int(row["dead_codes"]) == round((1 - usage) * QUICK.codebook_size)
        assert 1 <= perplexity <= usage * QUICK.codebook_size * (1 + 1e-6)


def test_the_summary_is_of_the_last_measurements(results):
    _, rows = results
    assert [row["remedy"] for row in rows["summary"]] == list(collapse.REMEDIES)
    for row in rows["summary"]:
        own = [r for r in rows["curves"] if r["remedy"] == row["remedy"]]
        for measure in collapse.MEASURES:
            first, second = (float(r[measure]) for r in own if int(r["step"]) == QUICK.steps)
            assert float(row[measure]) == pytest.approx((first + second) / 2)
            half = 12.706 * abs(first - second) / 2  # of two values: t · s / √2 with s = |a − b| / √2
            assert float(row[f"{measure}_interval"]) == pytest.approx(half, rel=1e-5, abs=1e-7)
        assert float(row["replaced"]) == sum(int(r["replaced"]) for r in own) / 2


def test_replacing_dead_codes_keeps_all_in_use(results):
    _, rows = results
    usage = {row["remedy"]: float(row["usage"]) for row in rows["summary"]}
    assert usage["gradient"] < 0.5
    assert usage["dead codes"] == usage["EMA, k-means, dead codes"] == 1


def test_one_seed_the_same_numbers():
    short = replace(QUICK, steps=2 * QUICK.every)
    first = collapse.train(short, "EMA, k-means, dead codes", 3)
    torch.manual_seed(1)
    assert collapse.train(short, "EMA, k-means, dead codes", 3) == first
    assert collapse.train(short, "EMA, k-means, dead codes", 4) != first


@pytest.mark.parametrize("count", [2, 5, 10])
def test_intervals_are_students(count):
    values = torch.randn(count, dtype=torch.float64)
    mean, half = collapse.interval(values.tolist())
    assert mean == pytest.approx(float(values.mean()))
    t = half * math.sqrt(count) / float(values.std())
    # the cumulative distribution of Student's t, integrated numerically from 0
    grid = torch.linspace(0, t, 200_001, dtype=torch.float64)
    freedom = count - 1
    density = (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    assert float(torch.trapezoid(density, grid)) * scale == pytest.approx(0.475, abs=1e-4)


def test_what_cannot_run_says_so(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        collapse.main(["--seed", "-1"])
    assert "--seed is -1; it must be at least 0" in capsys.readouterr().err
    monkeypatch.setattr(collapse.commands, "find_spec", lambda name: None)
    assert collapse.main(["--out", str(tmp_path)]) == 1
    assert "pip install 'lamkernels[demo]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
