"""The experiments: files that say what the theory says, the same bytes for one seed."""

import csv

import pytest
import torch

from lamkernels.lam import experiments, linear_experiments

pytestmark = pytest.mark.usefixtures("one_thread")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All experiments in their quick form: the folder, and the rows by name."""
    out = tmp_path_factory.mktemp("experiments") / "new" / "folder"
    assert experiments.main(["--quick", "--out", str(out)]) == 0
    rows = {}
    for name in experiments.NAMES:
        with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            rows[name] = list(csv.DictReader(file))
    return out, rows


def population(rows, **wanted):
    """Rows of the population with these values, numbers as numbers."""
    chosen = [row for row in rows if row["fit"] == "population" and all(row[k] == v for k, v in wanted.items())]
    return [{k: float(v) for k, v in row.items() if k not in ("fit", "remedy") and v} for row in chosen]


def test_every_experiment_writes_a_figure_and_its_numbers(results):
    out, rows = results
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{n}.{x}" for n in experiments.NAMES for x in ("csv", "png")
    )
    for name in experiments.NAMES:
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
        assert rows[name]


def test_leakage_starts_at_the_theorems_place(results):
    for row in population(results[1]["noise"]):
        leaks = row["ratio"] > 1  # σ_ε² above λ_k(Σ_q)
        assert (row["leakage"] > 0.1) == leaks and (row["recovery"] < 0.9) == leaks
        assert row["loss"] == pytest.approx(row["optimal_loss"])


def test_spare_capacity_leaks_but_across_views(results):
    plain, supervised, views = (
        [row["leakage"] for row in population(results[1]["capacity"], remedy=remedy)]
        for remedy in ("none", "action supervision", "cross-view")
    )
    assert plain[1] < 1e-9 < 0.1 < plain[2]  # σ_ε² is between two eigenvalues of Σ_q
    assert supervised[2] < 1e-3 and supervised[3] > 0.1
    assert max(views) < 1e-9


@pytest.mark.parametrize("remedy", ["action supervision", "optical flow", "representation", "cross-view"])
def test_remedies_change_the_outcome_at_their_thresholds(results, remedy):
    cured_above = remedy in ("action supervision", "optical flow")
    rows = population(results[1]["remedies"], remedy=remedy)
    assert {row["strength"] > row["threshold"] for row in rows} == {True, False}
    for row in rows:
        if abs(row["strength"] / row["threshold"] - 1) > 0.01:
            cured = (row["strength"] > row["threshold"]) == cured_above
            assert row["leakage"] == pytest.approx(0 if cured else 1, abs=1e-6)
            assert row["recovery"] == pytest.approx(1 if cured else 0, abs=1e-6)


def test_enough_pairs_make_the_inverse_model_a_representation(results):
    rows = [row for row in results[1]["remedies"] if row["remedy"] == "multi-step"]
    leaks = {float(row["strength"]): float(row["leakage"]) for row in rows}
    threshold = float(rows[0]["threshold"])
    assert leaks[min(leaks)] > 0.3
    assert max(leak for pairs, leak in leaks.items() if pairs > 1.5 * threshold) < 0.05


def test_dependence_breaks_the_prediction(results):
    for row in population(results[1]["dependence"]):
        if row["c"] == 0:
            assert row["leakage"] == pytest.approx(row["expected_leakage"], abs=1e-3)
            assert row["recovery"] == pytest.approx(row["expected_recovery"], abs=1e-3)
        if row["expected_recovery"] == 1:  # who recovers the action says c² of ε
            assert row["leakage"] >= row["c_squared"] - 1e-9
    supervised = population(results[1]["dependence"], remedy="action supervision")
    assert all(row["leakage"] == pytest.approx(row["c_squared"], abs=0.02) for row in supervised)
    assert any(
        row["leakage"] > 0.3 > row["expected_leakage"] for row in population(results[1]["dependence"], remedy="none")
    )


def test_controls_hold_every_value_of_every_sweep(results):
    rows = {row["figure"]: row for row in results[1]["controls"]}
    assert list(rows) == list(linear_experiments.CONTROLS)
    used = [row["eps_variance"] for row in results[1]["noise"]]
    assert rows["noise"]["eps_variance"].split() == list(dict.fromkeys(used))
    assert rows["remedies"]["samples"] == "2000" and rows["remedies"]["seed"] == "0"


def test_one_seed_the_same_bytes(results, tmp_path):
    out, _ = results
    threads = torch.get_num_threads()
    assert experiments.main(["noise", "controls", "--quick", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    for name in ("noise.csv", "noise.png", "controls.csv"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert experiments.main(["noise", "--quick", "--seed", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "noise.csv").read_bytes() != (out / "noise.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nose"], "NAME is 'nose'; it must be one of 'noise'"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        experiments.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert experiments.main(["controls", "--out", str(tmp_path / "file")]) == 1
    assert "experiments:" in capsys.readouterr().err


def test_without_matplotlib_it_says_so_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments.commands, "find_spec", lambda name: None)
    assert experiments.main(["--out", str(tmp_path)]) == 1
    assert "pip install 'lamkernels[demo]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
