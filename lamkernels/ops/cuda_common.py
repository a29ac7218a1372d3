"""How the CUDA C++ sources of csrc/ are compiled and launched: by NVRTC, through CuPy, on torch's current stream.

CuPy is imported by the first call that needs it. NVRTC is called here and not by ``cupy.RawModule``, which flushes
subnormal numbers to zero and knows no ``sm_90a``. What is compiled is kept in CuPy's folder.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import struct
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lamkernels

THREADS = 256  # of a block, in most kernels
SHARED, SHARED_ELSEWHERE = 163 * 1024, 99 * 1024  # bytes that a block may use
LARGE = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0))  # capabilities of GPUs with the first
DEFAULT_SHARED = 48 * 1024  # what a block may use unasked
OLDEST = (8, 0)
SLOTS = 2**14  # tickets of a device
PRELUDES = {
    "vector_quantize.cu": ("common.h",),
    "nearest_code_hopper.cu": ("common.h", "hopper.h"),
    "covariance_hopper.cu": ("common.h", "hopper.h"),
}
HOPPER = (9, 0)
FIRST_CALL = "the first call with backend='cuda' is inside a CUDA graph's capture; call it once before, to warm up"
TYPES = {torch.float32: "float", torch.float16: "f16", torch.bfloat16: "bf16"}


def missing() -> str:
    """Why no CUDA C++ kernel can run here, or ""."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "CUDA C++ needs an NVIDIA GPU; Triton serves this one"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 is the least"
    try:
        importlib.import_module("cupy")
        read_source("vector_quantize.cu")
    except Exception as error:  # CuPy can be broken in any way; the reason is what the user needs
        major = (torch.version.cuda or "13").partition(".")[0]
        return f"CuPy does not load the kernels ({error}); pip install cupy-cuda{major}x"
    return ""


@functools.cache
def read_source(name: str) -> str:
    """A file of csrc/, which is lamkernels/csrc where the package is installed."""
    package = Path(lamkernels.__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / name).is_file():
            return (folder / name).read_text()
    raise FileNotFoundError(f"csrc/{name} is not in this installation of lamkernels")


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may use there."""
    large = device.type != "cuda" or torch.cuda.get_device_capability(device) in LARGE
    return SHARED if large else SHARED_ELSEWHERE


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; 2 for CPU tensors, on which tests run the kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def types(x: torch.dtype, codes: torch.dtype) -> tuple[str, ...]:
    """How csrc/vector_quantize.cu is told the dtypes of rows and codes."""
    return f"-DX_TYPE={TYPES[x]}", f"-DC_TYPE={TYPES[codes]}"


def launch(
    kernel: str, source: str, defines: tuple[str, ...], grid: int, arguments: bytes, shared: int,
    device: torch.device, threads: int = THREADS,
) -> None:  # fmt: skip
    """Launches ``kernel`` of a source, compiled with these macros; its argument is one struct."""
    with torch.cuda.device(device):  # the current one, for CuPy too
        function = _function(kernel, source, defines, device)
        if shared > DEFAULT_SHARED and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        with _stream(torch.cuda.current_stream()):
            function((grid,), (threads,), (np.frombuffer(arguments, dtype=f"V{len(arguments)}"),), shared_mem=shared)


@functools.cache
def _function(kernel: str, source: str, defines: tuple[str, ...], device: torch.device) -> Any:
    return _module(source, defines, torch.cuda.get_device_capability(device), device).get_function(kernel)


@functools.cache
def _module(source: str, defines: tuple[str, ...], capability: tuple[int, int], device: torch.device) -> Any:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(FIRST_CALL)
    cupy: Any = importlib.import_module("cupy")
    return cupy.RawModule(path=str(compiled(source, defines, capability)))


def source_text(source: str) -> str:
    """A source behind what it shares with others: one text without includes."""
    return "\n".join(map(read_source, (*PRELUDES[source], source)))


def compiled(source: str, defines: tuple[str, ...], capability: tuple[int, int]) -> Path:
    """The file that NVRTC made of a source: for a GPU of this capability, or of the newest that NVRTC knows.

    Raises:
        RuntimeError: NVRTC's log, where it does not compile.
    """
    nvrtc: Any = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    text, number, known = source_text(source), 10 * capability[0] + capability[1], nvrtc.getSupportedArchs()
    target = f"sm_{number}" if number in known else f"compute_{max(known)}"
    options = ("-std=c++17", "--fmad=false", f"-arch={target}{'a' * ('hopper.h' in PRELUDES[source])}", *defines)
    key = hashlib.sha256(repr((text, options, nvrtc.getVersion())).encode()).hexdigest()
    folder = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
    path = folder / f"lamkernels-{key}.{'cubin' if number in known else 'ptx'}"
    if not path.is_file():
        program = nvrtc.createProgram(text, source, (), ())
        try:
            nvrtc.compileProgram(program, options)
            code = nvrtc.getCUBIN(program) if number in known else nvrtc.getPTX(program)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"NVRTC does not compile csrc/{source}:\n{nvrtc.getProgramLog(program)}") from error
        finally:
            nvrtc.destroyProgram(program)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(code + b"\0")  # CuPy takes the last byte of a cubin for the end of a text, and leaves it out
        Path(file.name).replace(path)  # whole, whoever else writes it
    return path


@functools.lru_cache(maxsize=64)
def _stream(stream: torch.cuda.Stream) -> Any:
    cuda: Any = importlib.import_module("cupy").cuda
    if hasattr(cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):  # CuPy 14 and recent torch
        return cuda.Stream.from_external(stream)
    return cuda.ExternalStream(stream.cuda_stream, stream.device_index)


class Tickets:
    """Counters of a device that are 0 before and after every launch: whose block is the last to finish.

    Launches of one stream follow each other and share theirs. A launch that a CUDA graph captures has its own, because
    the graph may be replayed on another stream beside any of them.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(FIRST_CALL)
        self.slots = torch.zeros(SLOTS, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once: the other streams do not wait for the zeros
        self.taken = 0
        self.of_stream: dict[tuple[int, int], int] = {}
        self.lock = threading.Lock()

    def take(self, heads: int, stream: int, capturing: bool) -> int:
        """The address of ``heads`` counters for a launch."""
        with self.lock:
            place = None if capturing else self.of_stream.get((stream, heads))
            if place is None:
                place = self.taken
                if place + heads > SLOTS:
                    raise RuntimeError(f"backend 'cuda' has used all of its {SLOTS} tickets; backend 'triton' has none")
                self.taken += heads
                if not capturing:
                    self.of_stream[stream, heads] = place
        return self.slots.data_ptr() + 4 * place


def tickets(device: torch.device, heads: int) -> int:
    """The address of a launch's tickets, on the current stream of its device."""
    stream = torch.cuda.current_stream(device).cuda_stream
    with _creation:
        counters = _tickets(device)
    return counters.take(heads, stream, torch.cuda.is_current_stream_capturing())


_creation = threading.Lock()  # a cache does not keep two threads from making what it holds


@functools.cache
def _tickets(device: torch.device) -> Tickets:
    return Tickets(device)


def pack(integers: tuple[int, ...], doubles: tuple[float, ...]) -> bytes:
    """The struct that a kernel takes: pointers and integers of 64 bits, then doubles."""
    return _packer(len(integers), len(doubles)).pack(*integers, *doubles)


@functools.cache
def _packer(integers: int, doubles: int) -> struct.Struct:
    return struct.Struct(f"={integers}q{doubles}d")
