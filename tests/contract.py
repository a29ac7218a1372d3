"""The numerics contract (docs/numerics.md) as assertions, against fp64 on the stored values."""

from __future__ import annotations

import torch
from lamkernels.bench.hard_data import HARD_DATA, bound, hard_data, scores
from torch import Tensor

__all__ = ["DTYPES", "HARD_DATA", "assert_contract", "bound", "hard_data", "scores"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def assert_contract(
    x: Tensor, codebook: Tensor, indices: Tensor, metric: str = "l2", precision: str = "default"
) -> None:
    """x (N, D), codebook (K, D): every finite row has a finite code within the bound, every other row has −1."""
    finite = x.isfinite().all(-1)
    assert (indices[~finite] == -1).all(), "a row that is not finite has a code"
    x, indices = x[finite], indices[finite]
    if x.shape[0] == 0:
        return
    assert ((indices >= 0) & (indices < codebook.shape[0])).all(), "a finite row has no code"
    values = scores(x, codebook, metric)
    chosen, best = values.gather(1, indices[:, None])[:, 0], values.amin(1)
    assert chosen.isfinite().all(), "a code that is not finite has won"
    if precision == "exact":
        assert (chosen - best <= 2.0**-40 * best.abs()).all()
        tied = (values == best[:, None]).int().argmax(1)  # the first of the exact minima
        exact = chosen == best
        assert (indices[exact] == tied[exact]).all(), "an exact tie did not go to the lowest index"
    else:
        regret, allowed = chosen - best, bound(x, codebook, metric)
        worst = (regret - allowed).argmax()
        assert (regret <= allowed).all(), f"row {worst}: regret {regret[worst]} > {allowed[worst]}"
