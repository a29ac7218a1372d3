"""How a small call in eager mode goes past the dispatcher, where that is half of what it costs."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamkernels.backend import is_available, resolve
from lamkernels.eager import is_plain
from lamkernels.validation import Backend


class OneCall(NamedTuple):
    """How a small call runs without the dispatcher: its ``plan``, and ``rows`` of x in place unless x is contiguous."""

    plan: Any
    rows: Tensor | None


def plan_one_call(
    x: Tensor, codebook: Tensor, gradient: str, metric: str, precision: str, backend: Backend,
    averaging: tuple[float, float] | None = None, whole_rows: bool = False, others: Sequence[Tensor] = (),
) -> OneCall | None:  # fmt: skip
    """A plan of :mod:`lamkernels.ops.vector_quantize.numba_one_call`, whose arguments these are, or None.

    With ``whole_rows`` x may have any shape of whole rows, if it is contiguous; its indices are (N,). None in compiled
    code, under transforms, for other backends, and for arguments that do not fit, or ``others`` that a kernel cannot
    read.
    """
    if not is_plain(x, codebook, *others) or not codebook.is_contiguous() or resolve(backend, "cpu") != "numba":
        return None
    if codebook.ndim not in (2, 3) or x.ndim < codebook.ndim - 1:
        return None
    module, shape, rows, strides = numba_one_call(), x.shape, None, None
    if x.is_contiguous():
        if whole_rows and x.numel() % codebook.shape[-1] == 0:
            shape = torch.Size((x.numel() // codebook.shape[-1], codebook.shape[-1]))
    else:
        detached = x.detach()
        rows = rows_in_groups(detached if codebook.ndim == 3 else detached.unsqueeze(0))
        strides = module.row_strides(rows)
    plan = module.plan(shape, strides, x.dtype, codebook.shape, codebook.dtype, metric, precision, gradient, averaging)
    return None if plan is None else OneCall(plan, rows)


def gpu_kernels(x: Tensor, *averages: Tensor, backend: Backend) -> Any:
    """What :func:`lamkernels.ops.vector_quantize.gpu_step.ema_step` takes to step with these; None where nothing does.

    Args:
        x: (..., D) on a GPU.
        averages: codebook (K, D), cluster_size (K,) and code_sums (K, D).
        backend: as for :func:`lamkernels.nearest_code`.
    """
    module = None if torch.compiler.is_compiling() else GPU_STEPS.get(resolve(backend, "cuda"))
    if module is None or not x.is_cuda or not _plain_fp32(averages, x):
        return None
    kernels, (codebook, sizes, sums) = load_step(module), averages
    shapes = sums.shape == codebook.shape and sizes.shape == codebook.shape[:1]
    fits = x.ndim > 0 and x.shape[-1] == codebook.shape[1] and kernels.fits(*codebook.shape, x.device)
    return kernels if shapes and fits and x.dtype in kernels.TYPES else None


def gpu_learned(x: Tensor, codebook: Tensor, *, backend: Backend) -> Any:
    """What :func:`lamkernels.ops.vector_quantize.gpu_step.learned_step` takes to step with these; None elsewhere.

    Args:
        x: (..., D).
        codebook: (K, D).
        backend: as for :func:`lamkernels.nearest_code`.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not x.is_cuda:
        return None
    if resolve(backend, "cuda") != "triton":
        return None
    fits = x.ndim > 0 and codebook.ndim == 2 and x.shape[-1] == codebook.shape[1]
    if not fits or not _plain_fp32((codebook,), x):
        return None
    kernels = load_step(GPU_STEPS["triton"])
    return kernels if x.dtype in kernels.TYPES else None


def gpu_upkeep(*state: Tensor, backend: Backend, rows: Tensor | None = None, mask: Tensor | None = None) -> Any:
    """:mod:`lamkernels.ops.codebook_upkeep.triton` where its kernels take these; None elsewhere.

    Args:
        state: codebook (K, D) and what else is updated with it.
        backend: as for :func:`lamkernels.nearest_code`.
        rows: (..., D) to draw from.
        mask: of them.
    """
    if not _may_take_triton(state[0], backend) or not _plain_fp32(state, rows, mask):
        return None
    upkeep = importlib.import_module("lamkernels.ops.codebook_upkeep.triton")
    return upkeep if rows is None or rows.dtype in upkeep.TYPES else None


def gpu_cosine(rows: Tensor, *, backend: Backend) -> Any:
    """:mod:`lamkernels.ops.triton_cosine` where its kernels take these rows (..., D); None elsewhere."""
    if not _may_take_triton(rows, backend) or not is_plain(rows, device="cuda") or not rows.is_contiguous():
        return None
    cosine = importlib.import_module("lamkernels.ops.triton_cosine")
    return cosine if rows.dtype in cosine.TYPES else None


def _may_take_triton(rows: Tensor, backend: Backend) -> bool:
    """Whether what is around the kernels of a backend may run in Triton: eager on a GPU, unless torch is asked for."""
    if torch.compiler.is_compiling() or not rows.is_cuda or resolve(backend, "cuda") == "reference":
        return False
    return is_available("triton")


def _plain_fp32(state: Sequence[Tensor], *others: Tensor | None) -> bool:
    """Whether kernels can take the state as it lies: plain fp32 tensors without gaps, with the others on one device."""
    every, device = [*state, *(tensor for tensor in others if tensor is not None)], state[0].device
    if not is_plain(*every, device=device.type) or any(tensor.device != device for tensor in every):
        return False
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in state)


GPU_STEPS = {"cuda": "cuda", "triton": "triton_step"}


@functools.cache
def load_step(name: str) -> Any:
    """Loaded when its compiler is there and a call asks for it."""
    return importlib.import_module(f"lamkernels.ops.vector_quantize.{name}")


@functools.cache
def numba_one_call() -> Any:
    """Loaded when Numba is there and a call on the CPU asks for it."""
    return importlib.import_module("lamkernels.ops.vector_quantize.numba_one_call")


@functools.cache
def numba_kernels(folder: str, name: str = "numba") -> Any:
    """A module of an operator's folder, loaded as :func:`numba_one_call` is."""
    return importlib.import_module(f"lamkernels.ops.{folder}.{name}")


@functools.cache
def numba_steps() -> Any:
    """Loaded as :func:`numba_one_call` is."""
    return importlib.import_module("lamkernels.ops.vector_quantize.numba_steps")


def rows_in_groups(x: Tensor) -> Tensor:
    """x (H, ..., D) as (H, N, D), or (H, B, N / B, D) where that spares a copy: feature maps with channels first."""
    heads, dim = x.shape[0], x.shape[-1]
    if x.ndim == 3:
        return x
    if x.ndim > 3 and not x.is_contiguous():
        axes = [i for i in range(1, x.ndim - 1) if x.shape[i] != 1]
        apart = [j for i, j in pairwise(axes) if x.stride(i) != x.shape[j] * x.stride(j)]
        if len(apart) == 1:
            return x.reshape(heads, math.prod(x.shape[1 : apart[0]]), math.prod(x.shape[apart[0] : -1]), dim)
    return x.reshape(heads, math.prod(x.shape[1:-1]), dim)
