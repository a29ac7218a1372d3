"""What an eager call on a GPU takes of the host, timed without one: the package's Python, and Triton's launch path.

At the sizes of latent action models that is the time of the wall. Calls run on CPU tensors, with the kernels of sm_90
behind a driver that launches nothing: what the CUDA driver and its allocator take is not in it, nor the results.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import lamkernels as lk
from lamkernels import backend

from .ahead import no_driver, pretended

ROUNDS = 15


class HostTime(NamedTuple):
    """Microseconds of the host in a call, the least of several rounds, and those without Triton's launch path."""

    call: str
    launches: int
    microseconds: float
    without_triton: float


GPU = torch.device("cuda", 0)
SHOWN = {  # what tensors say of themselves
    "is_cuda": True,
    "is_cpu": False,
    "device": property(lambda self: GPU),
    "get_device": lambda self: 0,
}


@contextlib.contextmanager
def as_if_on_a_gpu() -> Iterator[None]:
    """Tensors on the CPU say that they are on a GPU, whose kernels are compiled and not run."""
    status = backend._status

    def available(name: str) -> backend.BackendStatus:
        return backend.BackendStatus(True, "CUDA and ROCm tensors") if name == "triton" else status(name)

    with contextlib.ExitStack() as stack:
        stack.enter_context(pretended("sm_90"))
        stack.enter_context(no_driver("sm_90"))
        stack.enter_context(mock.patch.object(backend, "_status", available))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        for name, value in SHOWN.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, value))
        yield


class _Nothing(torch.autograd.Function):
    """What autograd takes of a step by itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(x.shape), x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _calls() -> dict[str, Callable[[], object]]:
    x, codebook, one = torch.randn(256, 32), torch.randn(8, 32), torch.ones(())
    leaf, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    half, many = torch.randn(4096, 64).half(), torch.randn(1024, 64).half()

    def quantized() -> object:
        out = lk.vector_quantize(leaf, codes)
        return torch.autograd.grad(out[:1] + out[2:4], (leaf, codes), (x, one, one))

    def step(module: lk.VectorQuantize, *more: torch.Tensor) -> object:
        out, _, loss = module(leaf)
        return torch.autograd.grad((out, loss), (leaf, *more), (x, one))

    def nothing() -> object:
        return torch.autograd.grad(_Nothing.apply(leaf), leaf, (x, one))  # type: ignore[no-untyped-call]

    ema, learned, cosine = (
        lk.VectorQuantize(32, 8, **options)
        for options in ({}, {"update": "gradient"}, {"update": "gradient", "metric": "cosine"})
    )
    return {
        "nearest_code 256 x 32, 8 codes": lambda: lk.nearest_code(x, codebook),
        "nearest_code 4096 x 64 fp16, 1024 codes": lambda: lk.nearest_code(half, many),
        "vector_quantize 256 x 32, 8 codes": lambda: lk.vector_quantize(x, codebook),
        "the same, with its backward": quantized,
        "autograd alone": nothing,
        "VectorQuantize, EMA step": lambda: step(ema),
        "VectorQuantize, gradient step": lambda: step(learned, learned.codebook),
        "VectorQuantize, gradient step, cosine": lambda: step(cosine, cosine.codebook),
        "moments 256 x 32": lambda: lk.moments(x),
    }


def host_times(seconds: float) -> list[HostTime]:
    """Times each call for so long with Triton's launch path and without."""
    found, launches = [], 0

    def counted(self: JITFunction[Any], *args: Any, **options: Any) -> None:
        nonlocal launches
        launches += 1

    with as_if_on_a_gpu():
        for name, call in _calls().items():
            taken = _least(call, seconds)
            with mock.patch.object(JITFunction, "run", counted):
                launches = 0
                call()
                found.append(HostTime(name, launches, taken, _least(call, seconds)))
    return found


def _least(call: Callable[[], object], seconds: float) -> float:
    """Microseconds of a call: the least mean of ROUNDS."""
    call()
    start = time.perf_counter()
    call()
    calls = max(1, int(seconds / ROUNDS / (time.perf_counter() - start)))
    means = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - start) / calls)
    return 1e6 * min(means)
