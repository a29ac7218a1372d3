from __future__ import annotations

import json

import pytest
import torch
from lamkernels.bench import compat

from lamkernels import cli


@pytest.mark.parametrize("case", compat.CASES, ids=lambda case: case.project)
def test_both_forms_agree_and_are_timed(case):
    times = compat.compare(case, 0.01, "cpu")
    assert times.plain > 0 and times.fused > 0 and times.speedup == times.plain / times.fused


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
    assert row["project"] == "UniVLA" and row["speedup"] > 0
    assert "UniVLA" in capsys.readouterr().out
