"""The numerics contract (docs/numerics.md) as assertions, against fp64 on the stored values."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
