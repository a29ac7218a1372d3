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
from lamkernels import backend, functional, one_call
from lamkernels.ops.vector_quantize import triton_step

from .ahead import no_driver, pretended

ROUNDS = 15


class HostTime(NamedTuple):
    """Microseconds of the host in a call, the least of several rounds, and those without Triton's launch path."""

    call: str
    launches: int
    microseconds: float
    without_triton: float


@contextlib.contextmanager
def _nothing_launched() -> Iterator[None]:
    """Triton serves CPU tensors, in kernels that are compiled and not run."""
    status = backend._status

    def available(name: str) -> backend.BackendStatus:
        return backend.BackendStatus(True, "CPU tensors") if name == "triton" else status(name)

    with (
        pretended("sm_90"),
        no_driver("sm_90"),
        mock.patch.object(backend, "_status", available),
        mock.patch.object(functional, "gpu_learned", _learned),
    ):
        yield


class _Module(lk.VectorQuantize):
    """Takes a CPU tensor for one on a GPU, after what is asked of such a one."""

    def _plan_one_call(self, x: torch.Tensor) -> None:
        return None

    def _gpu_kernels(self, x: torch.Tensor) -> Any:
        return triton_step if self.update == "ema" and one_call._updated_in_place(self._averages(), x) else None


class _Nothing(torch.autograd.Function):
    """What autograd takes of a step by itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(x.shape), x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _learned(x: torch.Tensor, codebook: torch.Tensor, **_: str) -> Any:
    """The same of a codebook that is learned by its gradient."""
    return triton_step if one_call._updated_in_place((codebook,), x) else None


def _calls() -> dict[str, Callable[[], object]]:
    x, codebook, one = torch.randn(256, 32), torch.randn(8, 32), torch.ones(())
    leaf, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    half, many = torch.randn(4096, 64).half(), torch.randn(1024, 64).half()

    def quantized() -> object:
        out = lk.vector_quantize(leaf, codes, backend="triton")
        return torch.autograd.grad(out[:1] + out[2:4], (leaf, codes), (x, one, one))

    def step(module: lk.VectorQuantize, *more: torch.Tensor) -> object:
        out, _, loss = module(leaf)
        return torch.autograd.grad((out, loss), (leaf, *more), (x, one))

    def nothing() -> object:
        return torch.autograd.grad(_Nothing.apply(leaf), leaf, (x, one))  # type: ignore[no-untyped-call]

    ema, learned = _Module(32, 8, backend="triton"), _Module(32, 8, update="gradient", backend="triton")
    return {
        "nearest_code 256 x 32, 8 codes": lambda: lk.nearest_code(x, codebook, backend="triton"),
        "nearest_code 4096 x 64 fp16, 1024 codes": lambda: lk.nearest_code(half, many, backend="triton"),
        "vector_quantize 256 x 32, 8 codes": lambda: lk.vector_quantize(x, codebook, backend="triton"),
        "the same, with its backward": quantized,
        "autograd alone": nothing,
        "VectorQuantize, EMA step": lambda: step(ema),
        "VectorQuantize, gradient step": lambda: step(learned, learned.codebook),
        "moments 256 x 32": lambda: lk.moments(x, backend="triton"),
        "finite_scalar_quantize 256 x 4": lambda: lk.finite_scalar_quantize(x[:, :4], [8, 5, 5, 5], backend="triton"),
    }


def host_times(seconds: float) -> list[HostTime]:
    """Times each call for so long with Triton's launch path and without."""
    found, launches = [], 0

    def counted(self: JITFunction[Any], *args: Any, **options: Any) -> None:
        nonlocal launches
        launches += 1

    with _nothing_launched():
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
