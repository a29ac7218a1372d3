from __future__ import annotations

import json
import runpy
from dataclasses import replace

import pytest
import torch

from lamkernels.lam import LAMConfig, TrainConfig, Trainer, throughput

pytest.importorskip("safetensors")
MODEL = LAMConfig(size=32, latent_dim=8, tokens=2, codebook_size=8)


@pytest.mark.parametrize("bottleneck", ["vq", "stock-vq", "gaussian"])
def test_the_parts_are_the_step(moving_square, bottleneck):
    """Weights, codebook and moments of the optimiser, to the last bit."""
    training = TrainConfig(steps=6, batch_size=16)
    whole, apart = (Trainer(replace(MODEL, bottleneck=bottleneck), moving_square, training) for _ in range(2))
    for _ in range(6):
        whole.train_step()
        elapsed = throughput.step_in_parts(apart)
    assert tuple(elapsed) == throughput.PARTS and min(elapsed.values()) > 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, apart.model.state_dict()[name]), name
    for first, second in zip(*(t.optimizer.state_dict()["state"].values() for t in (whole, apart)), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["throughput", "--help"])
    with pytest.raises(SystemExit), pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module(throughput.__name__, run_name="__main__")
    assert "--codebook-size" in capsys.readouterr().out
    arguments = ["--steps", "2", "--batch-size", "4", "--codebook-size", "16", "--out", str(tmp_path)]
    assert throughput.main(arguments) == 0
    results = json.loads((tmp_path / "throughput.json").read_text())
    printed = capsys.readouterr().out
    for name in ("stock", "fused"):
        found = results["variants"][name]
        assert sum(found["share"].values()) == pytest.approx(1)
        assert found["pairs_per_s"] == pytest.approx(4 * found["steps_per_s"])
        assert f"{found['parts_ms']['bottleneck']:.3f}" in printed
    with pytest.raises(SystemExit):
        throughput.main(["--batch-size", "2000"])
    assert "a batch takes 2000" in capsys.readouterr().err
