"""Which implementation of an operator runs, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lamkernels.validation import BACKENDS


class BackendStatus(NamedTuple):
    """Whether a backend can run here; ``reason`` says why not, or on which devices it runs."""

    available: bool
    reason: str


@functools.cache
def available_backends() -> dict[str, BackendStatus]:
    """What can run on this machine, by backend name, looked up once per process.

    Imports neither Numba nor Triton: it only asks whether they are installed.
    """
    gpu = torch.cuda.is_available()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not _installed("numba"):
        numba = BackendStatus(False, "Numba is not installed; pip install numba")
    else:
        numba = BackendStatus(True, "CPU tensors")
    if not _installed("triton"):
        triton = BackendStatus(False, "Triton is not installed; pip install triton (Linux)")
    elif not (gpu or interpreted):
        triton = BackendStatus(False, "no CUDA or ROCm device; TRITON_INTERPRET=1 runs the kernels on CPU tensors")
    else:
        triton = BackendStatus(True, "CPU tensors, in Triton's interpreter" if interpreted else "CUDA and ROCm tensors")
    cuda = BackendStatus(False, "this version has no CUDA C++ kernel; Triton serves GPUs")
    return {
        "reference": BackendStatus(True, "CPU, CUDA and ROCm tensors"),
        "numba": numba,
        "triton": triton,
        "cuda": cuda,
    }


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def resolve(backend: str, device_type: str) -> str:
    """The backend that runs: "auto" is resolved, an explicit request works or raises, and never falls back.

    ``LAMKERNELS_BACKEND`` stands in for "auto" only.
    """
    if backend == "auto":
        backend = os.environ.get("LAMKERNELS_BACKEND", "auto")
    status = available_backends()
    if backend == "auto":
        fast = "numba" if device_type == "cpu" else "triton"
        return fast if status[fast].available else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r} (LAMKERNELS_BACKEND); it must be one of {', '.join(BACKENDS)}")
    if not status[backend].available:
        raise RuntimeError(f"backend {backend!r} cannot run here: {status[backend].reason}")
    on_cpu = backend == "numba" or (backend == "triton" and "interpreter" in status[backend].reason)
    if backend != "reference" and on_cpu != (device_type == "cpu"):
        raise ValueError(f"backend {backend!r} runs on {status[backend].reason}, but x is on {device_type!r}")
    return backend


def load_kernel(folder: str, name: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The function ``name`` of ``lamkernels/ops/<folder>/<backend>.py``."""
    return _load(folder, name, resolve(backend, device.type))


@functools.cache
def _load(folder: str, name: str, backend: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] = getattr(importlib.import_module(f"lamkernels.ops.{folder}.{backend}"), name)
    return kernel
