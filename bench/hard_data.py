"""Data on which lookups go wrong, the numerics contract that ours keeps on them, and what each provider does.

The tests assert the contract on the same data (tests/contract.py); docs/numerics.md states it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .providers import PROVIDERS
from .workloads import Inputs, Workload


def scores(x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """What is minimised, in fp64 by differences, (N, K); +inf for codes that are not finite."""
    x, codebook = x.double(), codebook.double()
    finite = codebook.isfinite().all(-1)
    codes = codebook.masked_fill(~finite[:, None], 0.0)
    differences = metric == "l2"
    values = torch.stack([(x - code).square().sum(-1) for code in codes], -1) if differences else -(x @ codes.T)
    return values.masked_fill(~finite, torch.inf)


def bound(x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """B, the regret that precision="default" may have, (N,): for one fp32 product of fused multiply-adds a term."""
    eps = 2.0**-24
    dim = x.shape[-1]
    stored, x = x.dtype, x.double()
    codes = codebook.double()[codebook.isfinite().all(-1)]
    if stored == torch.float64:
        return 8 * dim * 2.0**-53 * (x.norm(dim=-1) + codes.norm(dim=-1).max()).square()
    if stored in (torch.float16, torch.bfloat16) or metric == "dot":
        return 8 * dim * eps * x.norm(dim=-1) * codes.norm(dim=-1).max()
    mean = codes.mean(0)
    row, code = (x - mean).norm(dim=-1), (codes - mean).norm(dim=-1).max()
    return 8 * (2.0**-21 + dim * eps) * row * code + 2.0**-22 * (row.square() + code.square())


def hard_data(name: str) -> tuple[Tensor, Tensor]:
    """Rows and codes, fp32, on which kernels go wrong."""
    randn = torch.randn
    if name == "offset 1, spread 0.02":
        return 1 + 0.02 * randn(4000, 128), 1 + 0.02 * randn(16, 128)
    if name == "offset 1000":
        return 1000 + randn(2000, 32), 1000 + randn(50, 32)
    if name == "one code at 1e7":
        codes = randn(33, 24)
        codes[5] = 1e7
        return randn(1000, 24), codes
    if name.startswith("near the mean of equal-norm codes"):
        dim = int(name.split("D = ")[1])
        codes = torch.nn.functional.normalize(randn(64, dim), dim=-1) * 10
        return codes.mean(0) + 1e-3 * randn(500, dim), codes
    if name == "entries near 1e30":
        x = randn(300, 9)
        x[::3] *= 1e30
        x[1::3, 0] = 3e38
        return x, torch.cat([randn(20, 9), 1e30 * randn(5, 9), 3e38 * torch.ones(1, 9)])
    if name == "partial sums that overflow":
        return torch.tensor([[3e38, -3e38]]), torch.tensor([[0.0, 1.0], [-2.0, -2.0], [2.0, 2.0]])
    if name == "entries near 1e-30":
        return 1e-30 * randn(300, 8), 1e-30 * randn(16, 8)
    if name == "duplicate codes":
        codes = randn(10, 16)
        return randn(2000, 16), codes[torch.randint(10, (70,))]
    if name == "integer grid":
        return torch.randint(-3, 4, (4000, 6)).float(), torch.randint(-3, 4, (200, 6)).float()
    if name == "integer grid with an offset":
        return torch.randint(997, 1004, (4000, 6)).float(), torch.randint(997, 1004, (200, 6)).float()
    assert name == "NaN and infinity"
    x, codes = randn(200, 12), randn(30, 12)
    x[::7, 3], x[1::7, 0], x[2::7, 11] = torch.nan, torch.inf, -torch.inf
    codes[0, 0], codes[4, 5], codes[9, 11] = torch.nan, torch.inf, -torch.inf
    return x, codes


HARD_DATA = (
    "offset 1, spread 0.02",
    "offset 1000",
    "one code at 1e7",
    "near the mean of equal-norm codes, D = 256",
    "near the mean of equal-norm codes, D = 1024",
    "entries near 1e30",
    "partial sums that overflow",
    "entries near 1e-30",
    "duplicate codes",
    "integer grid",
    "integer grid with an offset",
    "NaN and infinity",
)


class Outcome(NamedTuple):
    """What a provider did with one set.

    Attributes:
        data: its name.
        provider: who looked up.
        rows: finite rows.
        wrong: finite rows without a finite code, or with one past the bound of ``precision="default"``.
        ties: rows whose fp64 minimum several codes attain and that did not get the lowest of them.
        not_finite: rows with a NaN or an infinity that got a code.
        error: what it raised instead, or "".
    """

    data: str
    provider: str
    rows: int
    wrong: int
    ties: int
    not_finite: int
    error: str = ""

    @property
    def cell(self) -> str:
        """For the table: the wrong rows, ``t`` ties and ``n`` rows that are not finite behind them; or the error."""
        if self.error:
            return "error"
        parts = [str(self.wrong)] if self.wrong or not (self.ties or self.not_finite) else []
        parts += [f"{self.ties} t"] if self.ties else []
        parts += [f"{self.not_finite} n"] if self.not_finite else []
        return " + ".join(parts)


def outcomes(providers: Sequence[str], seed: int = 0) -> list[Outcome]:
    """Runs every provider that can look up on every set, on the CPU."""
    found = []
    for name in HARD_DATA:
        torch.manual_seed(seed)
        x, codebook = hard_data(name)
        for provider in providers:
            op = next((op for op in ("nearest_code", "vector_quantize") if op in PROVIDERS[provider].prepare), None)
            if op is not None and not PROVIDERS[provider].absent("cpu"):
                found.append(_outcome(name, provider, op, x, codebook))
    return found


def _outcome(name: str, provider: str, op: str, x: Tensor, codebook: Tensor) -> Outcome:
    finite = x.isfinite().all(-1)
    rows = int(finite.sum())
    inputs = Inputs([x.clone()], codebook.clone(), [], torch.get_num_threads(), tune=False)
    workload = Workload("hard data", op, x.shape[0], codebook.shape[0], x.shape[1])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = PROVIDERS[provider].prepare[op](workload, inputs)(0)
    except Exception as error:  # whatever it is, it is what this table is about
        return Outcome(name, provider, rows, 0, 0, 0, f"{type(error).__name__}: {error}".splitlines()[0])
    indices = torch.as_tensor(result["indices"]).reshape(-1).long()
    values = scores(x[finite], codebook)
    best = values.amin(1)
    known = (indices[finite] >= 0) & (indices[finite] < codebook.shape[0])
    chosen = values.gather(1, indices[finite].clamp(0, codebook.shape[0] - 1)[:, None])[:, 0]
    wrong = ~known | ~(chosen - best <= bound(x[finite], codebook))
    lowest = (values == best[:, None]).int().argmax(1)
    ties = ~wrong & (chosen == best) & (indices[finite] != lowest)
    given = int((indices[~finite] >= 0).sum())
    return Outcome(name, provider, rows, int(wrong.sum()), int(ties.sum()), given)


def table(found: Sequence[Outcome]) -> str:
    """Markdown: a row for each set, a column for each provider."""
    providers = list(dict.fromkeys(outcome.provider for outcome in found))
    cells = {(outcome.data, outcome.provider): outcome for outcome in found}
    lines = [f"| data | rows | {' | '.join(providers)} |", "|---" * (2 + len(providers)) + "|"]
    for name in HARD_DATA:
        row = [cells[name, provider].cell for provider in providers]
        lines.append(f"| {name} | {cells[name, providers[0]].rows} | {' | '.join(row)} |")
    return "\n".join(lines)
