"""Runs a compiled kernel on torch's own OpenMP threads.

Numba's threading layers bring a second OpenMP runtime into the process, whose idle threads spin against torch's. So
the kernels are plain C functions of one pointer, to int64 parameters, which draw tasks from a shared counter until
there is none left, and torch's OpenMP runtime is asked to run them: its threads, its thread count.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# how the entries of a dtype are stored, in Numba's types: bf16 and fp16 travel as bit patterns
STORED = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "uint16", torch.float16: "int16"}
MIN_WORK_PER_THREAD = 1 << 20  # multiply-adds; below, waking a thread costs more than it brings

HUGE, MADV_HUGEPAGE, PAGE = 1 << 22, 14, mmap.PAGESIZE  # bytes from which on; Linux's number

ZERO = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}  # kept as it is

_forked_from: list[int] = []  # not empty in a child process of fork, where OpenMP's threads are gone
os.register_at_fork(after_in_child=lambda: _forked_from.append(os.getppid()))


@functools.cache
def _gomp_parallel() -> Callable[..., None] | None:
    """``GOMP_parallel`` of the OpenMP runtime that torch is linked to, or None where it has none of that name."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def threading() -> str:
    """How many threads the kernels use, in words, for ``lamkernels info``."""
    if _gomp_parallel() is None:
        return "1 thread: torch's OpenMP runtime has no GOMP_parallel"
    return f"{torch.get_num_threads()} threads of torch's OpenMP runtime (torch.set_num_threads)"


@functools.cache
def compiled(kernel: Any, dtype: torch.dtype) -> Any:
    """The C function of a kernel for a dtype, compiled on its first use and then taken from Numba's cache on disk.

    A kernel is a plain function of one pointer, to an array of int64. Declaring it a pointer to what the dtype is
    stored as tells the kernel its types, and Numba's cache the kernels of one function apart: ``simd.words``,
    ``simd.stored_type`` and ``simd.computed_type`` of the pointer say what it needs.
    """
    import numba

    return numba.cfunc(f"void(CPointer({STORED[dtype]}))", cache=True)(kernel)


@functools.cache
def entry(kernel: Any) -> Callable[[int], None]:
    """A kernel as a function of the address of its parameters, for the calling thread alone."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel.address)


@functools.lru_cache
def bits(number: float) -> int:
    """Those of a number as fp64, as an int64 parameter."""
    (found,) = struct.unpack("q", struct.pack("d", number))
    return int(found)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, in huge pages where it is large.

    A large tensor is fresh memory each time, and a page fault for each 4 KiB takes longer than to compute what goes
    there. Where the kernel knows no huge pages, this is ``torch.empty``.
    """
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    madvise = _madvise() if tensor.nbytes >= HUGE else None
    if madvise is not None:
        start = tensor.data_ptr() + -tensor.data_ptr() % PAGE
        madvise(start, (tensor.data_ptr() + tensor.nbytes - start) // PAGE * PAGE, MADV_HUGEPAGE)
    return tensor


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the shape and dtype of x, as :func:`empty` makes it."""
    return empty(x.shape, x.dtype) if x.nbytes >= HUGE else torch.empty_like(x, memory_format=torch.contiguous_format)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def launch(kernel: Any, parameters: Sequence[int], tasks: int, work: int) -> None:
    """Runs ``kernel`` (a Numba cfunc) until its tasks are done; the calling thread takes part.

    Args:
        kernel: ``void(int64*)``. The array it gets is [0, 0, *parameters]: two counters, of the tasks drawn and done.
        parameters: addresses, sizes and options.
        tasks: how many tasks there are, the most threads that can be busy.
        work: multiply-adds of the call.
    """
    array = (ctypes.c_int64 * (len(parameters) + 2))(0, 0, *parameters)
    run(kernel, ctypes.addressof(array), tasks, work)


def run(kernel: Any, address: int, tasks: int, work: int) -> None:
    """:func:`launch` for an array that is laid out already."""
    threads = min(torch.get_num_threads(), tasks, 1 + work // MIN_WORK_PER_THREAD)
    parallel = _gomp_parallel() if threads > 1 and not _forked_from else None
    if parallel is None:
        entry(kernel)(address)
    else:
        parallel(kernel.address, address, threads, 0)
