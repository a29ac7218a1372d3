"""Networks in the place of the linear model: they learn what the closed form predicts, and a stopped run goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lamkernels.lam import nonlinear_experiments as experiments
from lamkernels.lam.bottlenecks import BOTTLENECKS
from lamkernels.lam.effects import effects
from lamkernels.lam.linear_experiments import Controls
from lamkernels.lam.vector_lam import Transitions, VectorLAM, train_vector_lam

SMALL = experiments.NonlinearControls(
    Controls(samples=3000, horizon=2), bottlenecks=("none",), steps=400, batch_size=256, seeds=(0, 1)
)
TINY = replace(SMALL, linear=Controls(samples=300, eps_variance=(0.1, 4.0)), steps=3, bottlenecks=("none", "vq"))


def measured(remedy: str, variance: float, bottleneck: str = "none") -> tuple[float, float]:
    row = experiments.Runner(SMALL).run(experiments.Point(variance, 0.0, remedy, bottleneck, 0))
    return row["leakage"], row["recovery"]


def test_below_the_threshold_the_action_is_encoded_and_above_it_the_noise():
    leakage, recovery = measured("none", 0.1)
    assert leakage < 0.05 and recovery > 0.9
    leakage, recovery = measured("none", 8.0)
    assert leakage > 0.5 > recovery


@pytest.mark.parametrize("remedy", ["action supervision", "representation", "cross-view"])
def test_a_remedy_prevents_it(remedy):
    leakage, recovery = measured(remedy, 4.0)
    assert leakage < 0.1 and recovery > 0.7


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_every_bottleneck_trains(bottleneck):
    generator = torch.Generator().manual_seed(0)
    o, change, a = (torch.randn(512, size, generator=generator) for size in (4, 4, 2))
    data = Transitions(o, o + change, o + change, auxiliary=a, labelled=100)
    first, second = (
        train_vector_lam(data, 2, bottleneck, auxiliary_weight=1.0, codebook_size=16, steps=150, batch_size=64, seed=3)
        for _ in range(2)
    )
    z = first.encode(o, o + change)
    assert torch.equal(z, second.encode(o, o + change)) and z.shape == (512, 2)
    if bottleneck not in ("none", "gaussian"):
        assert len(z.unique(dim=0)) <= 16
    with torch.no_grad():
        prediction, _, auxiliary, loss = first(o, o + change)
    assert prediction.shape == o.shape and auxiliary.shape == a.shape and loss.shape == ()
    assert (prediction - o - change).square().sum(1).mean() < change.square().sum(1).mean()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="bottleneck is 'vae'; it must be one of 'none'"):
        VectorLAM(4, 2, "vae")
    with pytest.raises(ValueError, match="latent_dim is 0"):
        VectorLAM(4, 0)
    data = Transitions(*torch.zeros(3, 8, 4))
    with pytest.raises(ValueError, match="learning_rate is 0"):
        train_vector_lam(data, 2, learning_rate=0.0)


def test_a_stopped_experiment_goes_on_behind_the_last_row(tmp_path, monkeypatch):
    expected = experiments.rows_of(TINY)
    journal, run, made = tmp_path / "rows.jsonl", experiments.Runner.run, []

    def stops(self, point):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(point)
        return run(self, point)

    with monkeypatch.context() as patch:
        patch.setattr(experiments.Runner, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            experiments.rows_of(TINY, journal)
    with journal.open("a") as lines:
        lines.write('["cut o')
    later = []
    monkeypatch.setattr(experiments.Runner, "run", lambda self, point: later.append(point) or run(self, point))
    assert experiments.rows_of(TINY, journal) == expected
    assert [*made, *later] == list(experiments.points(TINY))
    later.clear()
    assert experiments.rows_of(TINY, journal) == expected and not later
    with pytest.raises(ValueError, match="rows of a run with other controls"):
        experiments.rows_of(replace(TINY, steps=2), journal)


def test_the_command_writes_figures_and_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    controls = {"noise": TINY, "bottlenecks": TINY, "remedies": TINY, "dependence": TINY}
    monkeypatch.setattr(experiments, "CONTROLS", controls)
    assert experiments.main(["--processes", "1", "--out", str(tmp_path)]) == 0
    for name in controls:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        header, *rows = (tmp_path / f"{name}.csv").read_text().splitlines()
        assert header.startswith("eps_variance,coupling,remedy,bottleneck,seed,ratio,leakage,recovery")
        assert len(rows) == len(list(experiments.points(TINY)))
    assert not list(tmp_path.glob("*.jsonl"))
    with pytest.raises(SystemExit):
        experiments.main(["noize"])
    assert "NAME is 'noize'; it must be one of 'noise'" in capsys.readouterr().err


def test_an_effect_is_of_one_seed_and_keeps_its_sign():
    rows = [
        {"bottleneck": "vq", "remedy": remedy, "seed": seed, "leakage": leakage}
        for remedy, values in {"none": (0.4, 0.8), "flow": (0.1, 0.5), "views": (0.5, 0.7)}.items()
        for seed, leakage in enumerate(values)
    ]
    flow, views = effects([*rows[::-1], {"bottleneck": "linear", "remedy": "none", "seed": 0, "leakage": 0.4}])[::-1]
    assert flow["remedy"] == "flow" and flow["leakage"] == pytest.approx(-0.3)
    assert flow["leakage_interval"] == pytest.approx(0, abs=1e-6)  # both seeds change alike
    assert views["leakage"] == pytest.approx(0) and views["leakage_interval"] == pytest.approx(12.706 * 0.1, rel=1e-4)
