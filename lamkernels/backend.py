"""Which implementation of an operator runs, and why."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lamkernels.validation import BACKENDS


class BackendStatus(NamedTuple):
    """Whether a backend is ``available`` here; ``reason`` says why not, or on which devices it runs."""

    available: bool
    reason: str


def available_backends() -> dict[str, BackendStatus]:
    """What can run here, by backend name. Looks once per process; imports Numba, and Triton and CuPy for a GPU."""
    return {name: _status(name) for name in BACKENDS if name != "auto"}


def is_available(backend: str) -> bool:
    """Whether a backend can run here; imports what this one needs."""
    return _status(backend).available


@functools.cache
def _status(backend: str) -> BackendStatus:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "cuda":
        reason = importlib.import_module("lamkernels.ops.cuda_common").missing()
        return BackendStatus(not reason, reason or "CUDA tensors, on request")
    if backend == "triton" and not (torch.cuda.is_available() or interpreted):
        return BackendStatus(False, "no CUDA or ROCm device; TRITON_INTERPRET=1 runs the kernels on CPU tensors")
    if backend in ("numba", "triton"):
        try:
            importlib.import_module(backend)
            importlib.import_module(f"lamkernels.ops.nearest_code.{backend}")
        except ImportError as error:
            return BackendStatus(False, f"import {backend} fails ({error}); pip install {backend}")
        except Exception as error:  # an installation can be broken in any way; the reason is what the user needs
            hint = "; NUMBA_CACHE_DIR names a folder to cache in" if "cache" in str(error) else ""
            return BackendStatus(False, f"the {backend} kernels do not load ({error}){hint}")
    if backend == "triton":
        return BackendStatus(True, "CPU tensors, in Triton's interpreter" if interpreted else "CUDA and ROCm tensors")
    return BackendStatus(True, "CPU tensors" if backend == "numba" else "CPU, CUDA and ROCm tensors")


def resolve(backend: str, device_type: str) -> str:
    """The backend that runs: "auto" is resolved, an explicit request works or raises, and never falls back.

    ``LAMKERNELS_BACKEND`` stands in for "auto" only.
    """
    if backend == "auto":
        backend = os.environ["LAMKERNELS_BACKEND"] if _asked() else "auto"
    if backend == "auto":
        fast = "numba" if device_type == "cpu" else "triton"
        return fast if _status(fast).available else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r} (LAMKERNELS_BACKEND); it must be one of {', '.join(BACKENDS)}")
    available, reason = _status(backend)
    if not available:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    if backend != "reference" and reason.startswith("CPU") != (device_type == "cpu"):
        raise ValueError(f"backend {backend!r} runs on {reason}, but x is on {device_type!r}")
    return backend


# Where a variable is not set, os.environ raises and catches an exception, and every small call asks for it: what lies
# under os.environ only looks.
_variables: Any = getattr(os.environ, "_data", os.environ)
_ASKED: Any = os.environ.encodekey("LAMKERNELS_BACKEND") if _variables is not os.environ else "LAMKERNELS_BACKEND"


def _asked() -> bool:
    return _ASKED in _variables


def load_kernel(folder: str, name: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The function ``name`` of ``lamkernels/ops/<folder>/<backend>.py``."""
    return _load(folder, name, resolve(backend, device.type))


@functools.cache
def _load(folder: str, name: str, backend: str) -> Callable[..., Any]:
    try:
        kernel: Callable[..., Any] = getattr(importlib.import_module(f"lamkernels.ops.{folder}.{backend}"), name)
    except ModuleNotFoundError as error:
        if backend != "cuda" or "cuda" not in (error.name or "").split("."):
            raise
        raise ValueError(f"backend 'cuda' has no kernel for {folder}; 'triton' and 'reference' have") from error
    return kernel
