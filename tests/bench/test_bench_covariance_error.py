"""The table of errors: ours is as exact as documented, an expanded square is not, and every cell is there."""

import pytest
from lamkernels.bench import covariance_error


def test_errors_of_an_offset(monkeypatch):
    monkeypatch.setattr(covariance_error, "ROWS", 5000)
    found = covariance_error.outcomes(["normal, mean 1000"])
    errors = {outcome.estimator: outcome.error for outcome in found}
    assert errors["moments"] < 1e-7
    assert errors['"exact"'] < 1e-12
    assert errors["Σxxᵀ − N x̄x̄ᵀ"] > 1e-2
    assert errors["torch.cov"] == pytest.approx(0, abs=1e-5)
    if "deeptime" in errors:
        assert errors["deeptime"] < 1e-12
    assert covariance_error.table(found).count("\n") == 2
