"""The ceilings of this machine, measured in the process that is timed; no datasheets."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
GEMM_SIZE = {"cpu": 1536, "cuda": 8192}


class Peaks(NamedTuple):
    """Ceilings.

    Attributes:
        bandwidth: bytes/s of a large copy, read and write both counted.
        flops: operations/s of a square product, in the arithmetic that the dtype allows (see :func:`measure_peaks`).
    """

    bandwidth: float
    flops: float

    def seconds(self, bytes_moved: int, flops: int) -> float:
        """The time that neither ceiling lets anything undercut."""
        return max(bytes_moved / self.bandwidth, flops / self.flops)

    def bound(self, bytes_moved: int, flops: int) -> str:
        """The ceiling that decides: "memory" or "compute"."""
        return "memory" if bytes_moved / self.bandwidth > flops / self.flops else "compute"


def accurate_rate(plain: float, tf32: float, half: float = 0.0) -> float:
    """The rate of fp32 products on a GPU: plain, or three TF32 products that make one accurate to fp32.

    A covariance's bound allows three products of bfloat16 too: ``half`` is their rate there, 0 elsewhere.
    """
    return max(plain, tf32 / 3, half / 3)


def measure_peaks(device: str, dtype: str, op: str = "") -> Peaks:
    """Measures both ceilings, for an operator of :data:`~.workloads.OPS`.

    On a GPU the products of float16 and bfloat16 input count against the tensor-core rate of that type, and those of
    float32 input against :func:`accurate_rate`. On a CPU they count against the better of fp32 and the input's type.
    """
    size = GEMM_SIZE[device]
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / best_seconds(lambda: target.copy_(source), device)

    def product_rate(kind: str) -> float:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, kind)) for _ in range(2))
        return 2 * size**3 / best_seconds(lambda: torch.mm(a, b), device)

    if device == "cpu":
        return Peaks(bandwidth, max(product_rate(kind) for kind in {"float32", dtype}))
    if dtype != "float32":
        return Peaks(bandwidth, product_rate(dtype))
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        plain = product_rate("float32")
        torch.backends.cuda.matmul.allow_tf32 = True
        half = product_rate("bfloat16") if op == "covariance" else 0.0
        return Peaks(bandwidth, accurate_rate(plain, product_rate("float32"), half))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def best_seconds(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    """The shortest of a few calls, after one to warm up."""
    best = float("inf")
    for attempt in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best
