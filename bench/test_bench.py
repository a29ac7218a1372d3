"""The same workloads through pytest-benchmark: ``pytest bench/ --benchmark-only``.

All providers share this process, so their thread pools may disturb one another: this tracks our own times from commit
to commit. Times beside the peers come from ``lamkernels bench``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .check import check
from .providers import PROVIDERS
from .workloads import WORKLOADS, Workload, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN_PROCESS = ("numba", "triton", "cuda", "reference", "eager", "vqp", "faiss", "sklearn", "onedal")
SMALL = 2**23  # scores: the larger workloads take seconds a call with the reference


@pytest.mark.parametrize("name", IN_PROCESS)
@pytest.mark.parametrize(
    "workload",
    [w for w in WORKLOADS if w.measure == "time" and DEVICE in w.devices and w.N * w.K <= SMALL],
    ids=lambda workload: workload.name.replace(" ", "-"),
)
def test_workload(benchmark: Any, workload: Workload, name: str) -> None:
    provider = PROVIDERS[name]
    if workload.op not in provider.prepare:
        pytest.skip(f"{name} has no {workload.op}")
    if reason := provider.absent(DEVICE) or provider.refuses(workload):
        pytest.skip(reason)
    inputs = make_inputs(workload, DEVICE, threads=torch.get_num_threads())._replace(tune=False)
    run = provider.prepare[workload.op](workload, inputs)
    verdict = check(workload, inputs, run(0), strict=provider.kind != "peer")
    assert not verdict.error

    def call() -> None:
        run(0)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(mismatch_rate=verdict.mismatch_rate, max_regret=verdict.max_regret)
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
