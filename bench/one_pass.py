"""What the fused forward costs beyond the lookup: output, losses, counts and sums in the same pass over the rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lamkernels as lk

ROTATED_BYTES = 192 * 2**20  # of rows, more than a cache holds
ROUNDS = 15  # of all calls, at least
LARGE_CODEBOOK = 1024  # codes from which on the lookup alone should be nearly all of the cost


class OnePass(NamedTuple):
    """Medians in milliseconds; ``copy`` is of the rows into memory that is there, ``clone`` into new memory."""

    shape: tuple[int, int, int]
    lookup: float
    forward: float
    copy: float
    clone: float

    @property
    def allowed(self) -> float:
        """1.1 × the lookup for large codebooks, else the lookup and 1.2 × the copy."""
        return 1.1 * self.lookup if self.shape[1] >= LARGE_CODEBOOK else self.lookup + 1.2 * self.copy


def one_pass(shape: tuple[int, int, int], seconds: float) -> OnePass:
    """Times the three in turns on the CPU, on fp32 rows that rotate past the caches."""
    rows, num_codes, dim = shape
    generator = torch.Generator().manual_seed(0)
    buffers = max(3, ROTATED_BYTES // (4 * rows * dim))
    inputs = [torch.randn(rows, dim, generator=generator) for _ in range(buffers)]
    targets = [torch.zeros(rows, dim) for _ in range(buffers)]
    codebook = torch.randn(num_codes, dim, generator=generator)
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "lookup": lambda x, _: lk.nearest_code(x, codebook),
        "forward": lambda x, _: lk.vector_quantize(x, codebook),
        "copy": lambda x, target: target.copy_(x),
        "clone": lambda x, _: x.clone(),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn, end = 0, float("inf")
    while time.perf_counter() < end or turn < ROUNDS * len(calls):
        for name, call in calls.items():
            x, target = inputs[turn % buffers], targets[turn % buffers]
            start = time.perf_counter()
            result = call(x, target)
            times[name].append(1e3 * (time.perf_counter() - start))
            del result
            turn += 1
        if turn == 2 * len(calls):  # warm
            times = {name: [] for name in calls}
            end = time.perf_counter() + 3 * seconds
    return OnePass(shape, *(sorted(taken)[len(taken) // 2] for taken in times.values()))
