from __future__ import annotations

import json

import pytest
import torch
from lamkernels.bench import compat

from lamkernels import cli


@pytest.mark.parametrize("case", compat.CASES, ids=lambda case: case.project)
def test_both_forms_agree_and_are_timed(case, monkeypatch):
    monkeypatch.setattr(compat, "WARM", 2)
    times = compat.compare(case, 0.01, "cpu")
    assert times.plain > 0 and times.fused > 0 and times.speedup == times.plain / times.fused
    assert times.harness > 0
    if case.project != "tinyworlds":  # three operations, of about the harness's own cost
        assert times.harness < times.plain
    assert (times.kernels or 0) < times.fused
    if case.project.split()[0] in ("LAPA", "UniVLA", "villa-X", "Moto"):
        assert times.kernels is not None and times.kernels > 0


def test_the_harness_is_a_step_without_the_module():
    for case in compat.CASES:
        plain = compat.Step(case, case.plain, "cpu")
        found = plain()[0].detach().clone(), [leaf.grad for leaf in plain.leaves]
        harness = plain.harness()
        outputs = harness()
        assert outputs[0].shape == found[0].shape and outputs[0].requires_grad
        for leaf, grad in zip(harness.leaves, found[1], strict=True):
            assert (leaf.grad is None) == (grad is None)


def test_a_form_that_differs_is_not_timed():
    case = compat.CASES[2]

    def wrong(**options):
        module = case.fused(**options)
        torch.nn.init.normal_(module.codebook.weight)
        return module

    with pytest.raises(AssertionError):
        compat.compare(case._replace(fused=wrong), 0.01, "cpu")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compat, "CASES", compat.CASES[2:3])
    path = tmp_path / "compat.json"
    assert cli.main(["bench", "--compat", "--quick", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["microseconds"]
    assert row["project"] == "UniVLA" and row["speedup"] > 0 and "beyond_harness" in row and row["harness"] > 0
    assert "UniVLA" in capsys.readouterr().out
