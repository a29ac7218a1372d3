from __future__ import annotations

import json

import pytest
import torch
from lamkernels.bench import screening

import lamkernels as lk
from lamkernels import cli


@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
def test_the_nearest_code_is_always_a_candidate(offset):
    x, codebook = offset + torch.randn(300, 64), offset + torch.randn(200, 64)
    kept = screening.candidates(x, codebook)
    nearest = lk.nearest_code(x, codebook, precision="exact")
    assert kept.gather(1, nearest[:, None]).all()
    if offset == 0:
        assert kept.sum(1).float().mean() < 20  # and most others are not


def test_the_command(tmp_path, capsys):
    path = tmp_path / "screening.json"
    assert cli.main(
        ["bench", "--screening", "--shape", "300,40,16", "--op", "nearest_code", "--quick", "--json", str(path)]
    ) == 0  # fmt: skip
    (row,) = json.loads(path.read_text())["screenings"]
    assert row["shape"] == [300, 40, 16] and row["missed"] == 0 and 0 <= row["undecided"] <= 1
    assert "undecided" in capsys.readouterr().out
