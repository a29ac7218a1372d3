"""Could a bf16 product decide most rows? Screening with a certified error bound, and what is left for fp64.

A lookup in fp32 cannot pass the rate of fp32 products. A product in bf16 can, where the hardware has one, and leaves
for each row the codes that may be the nearest one for all its error; only these would be scored again in fp64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import lamkernels as lk

BLOCK = 1024  # rows whose scores are held at a time


class Screening(NamedTuple):
    """Seconds at one shape, fp32 rows from N(0, 1), and what the screening leaves.

    Attributes:
        shape: (N, K, D).
        lookup: of ``nearest_code``.
        sgemm: of torch's fp32 product of rows and codes.
        bf16: of torch's bf16 product of them.
        minimum: of the least score of each row, read from stored scores by torch.
        undecided: share of the rows with more than one candidate.
        candidates: how many an undecided row has on the mean.
        most: how many one has at most.
        missed: rows whose nearest code in fp64 is not among the candidates: 0, or the bound does not hold.
    """

    shape: tuple[int, int, int]
    lookup: float
    sgemm: float
    bf16: float
    minimum: float
    undecided: float
    candidates: float
    most: int
    missed: int


def candidates(x: Tensor, codebook: Tensor) -> Tensor:
    """(N, K) bool: the codes that may be the nearest ones, from the bf16 product of x (N, D) and codebook (K, D).

    A product is off by at most ‖x − x̃‖·‖c‖ + ‖x̃‖·‖c − c̃‖ from rounding what goes in, D·2⁻²⁴·‖x̃‖·‖c̃‖ from summing it
    in fp32, and 2⁻⁸ of itself from rounding what comes out.
    """
    rows, codes = x.bfloat16(), codebook.bfloat16()
    product = (rows @ codes.T).double()
    norm, code_norm = (t.double().norm(dim=-1) for t in (rows, codes))
    rounding, code_rounding = ((t.double() - u.double()).norm(dim=-1) for t, u in ((x, rows), (codebook, codes)))
    exact_norm = codebook.double().norm(dim=-1)
    error = rounding[:, None] * exact_norm + norm[:, None] * (code_rounding + x.shape[1] * 2.0**-24 * code_norm)
    error += 2.0**-8 * product.abs()
    score = exact_norm.square() / 2 - product
    return score - error <= (score + error).amin(1, keepdim=True)


def screening(shape: tuple[int, int, int], seconds: float) -> Screening:
    """Times the products in turns on the CPU, and counts what the screening would leave to decide."""
    num_rows, num_codes, dim = shape
    generator = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(n, dim, generator=generator) for n in (num_rows, num_codes))
    rows, codes = x.bfloat16(), codebook.bfloat16()
    scores = torch.randn(BLOCK, num_codes, generator=generator)
    calls: dict[str, Callable[[], object]] = {
        "lookup": lambda: lk.nearest_code(x, codebook),
        "sgemm": lambda: x @ codebook.T,
        "bf16": lambda: rows @ codes.T,
        "minimum": lambda: scores.min(1),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times["bf16"]) < 3:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    median = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    median["minimum"] *= num_rows / BLOCK
    nearest = lk.nearest_code(x, codebook, precision="exact")
    kept = [candidates(part, codebook) for part in x.split(BLOCK)]
    counts = torch.cat([part.sum(1) for part in kept])
    missed = sum(
        int((~part.gather(1, index[:, None])).sum()) for part, index in zip(kept, nearest.split(BLOCK), strict=True)
    )
    undecided = counts[counts > 1]
    return Screening(
        shape, **median, undecided=len(undecided) / num_rows,
        candidates=undecided.double().mean().item() if len(undecided) else 0.0, most=int(counts.max()), missed=missed,
    )  # fmt: skip
