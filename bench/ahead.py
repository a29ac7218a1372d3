"""Triton kernels compiled ahead of time, on any machine: what a call would launch, what it uses, its machine code.

The launchers run on meta tensors with the launch replaced by a recorder, so that what is compiled is what tuning.py
picks for that target, shape and dtype, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lamkernels import tuning
from lamkernels.ops import triton_cosine
from lamkernels.ops.code_statistics import triton as statistics
from lamkernels.ops.covariance import triton as covariances
from lamkernels.ops.nearest_code import triton as nearest
from lamkernels.ops.vector_quantize import gpu_step
from lamkernels.ops.vector_quantize import triton as quantize

KB = 1024
BUNDLED = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROGRAMS = 528  # four on each multiprocessor of an H100
SHARED = {  # bytes of shared memory that a program may use
    "sm_80": 163 * KB, "sm_86": 99 * KB, "sm_89": 99 * KB, "sm_90": 227 * KB, "sm_100": 227 * KB, "sm_120": 99 * KB,
    "gfx942": 64 * KB,
}  # fmt: skip
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip


class Launch(NamedTuple):
    """A kernel with everything that decides its code; ``constants`` and ``aligned`` name arguments by place."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int], Any], ...]
    aligned: tuple[tuple[int], ...]
    options: tuple[tuple[str, int], ...]


class Use(NamedTuple):
    """What a program of a compiled kernel takes: bytes of shared memory, and registers and bytes of stack a thread."""

    shared: int
    registers: int
    stack: int


def record(target: str, call: Callable[[], object]) -> list[Launch]:
    """The launches of ``call``, which is given meta tensors, as they would be made on ``target``."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: int) -> None:
        signature, constants, aligned = [], [], []
        for i, (param, arg) in enumerate(zip(self.params, args, strict=True)):
            if param.is_constexpr:
                signature.append((param.name, "constexpr"))
                constants.append(((i,), arg))
            elif isinstance(arg, torch.Tensor):
                signature.append((param.name, "*" + TYPES[arg.dtype]))
                aligned.append((i,))
            elif type(arg) is int and arg == 1:  # as the runtime does
                signature.append((param.name, "constexpr"))
                constants.append(((i,), arg))
            elif isinstance(arg, float):
                signature.append((param.name, "fp32"))
            else:
                signature.append((param.name, "i64" if arg >= 2**31 else "i32"))
                if arg % 16 == 0:
                    aligned.append((i,))
        launches.append(Launch(self, tuple(signature), tuple(constants), tuple(aligned), tuple(options.items())))

    with contextlib.ExitStack() as stack:
        stack.enter_context(pretended(target))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        for module in (gpu_step, triton_cosine):  # whose gradients have no values here
            stack.enter_context(mock.patch.object(module, "is_ordinary", lambda *grads, device: True))
        call()
    return launches


@contextlib.contextmanager
def pretended(target: str) -> Iterator[None]:
    """Launchers choose what they would on ``target``, wherever their tensors are."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(tuning, "target_of", lambda device: target))
        for module in (nearest, quantize, statistics, covariances):
            stack.enter_context(mock.patch.object(module, "persistent_programs", lambda device: PROGRAMS))
        yield


def compiled(target: str, call: Callable[[], object]) -> list[tuple[str, Any]]:
    """The kernels of ``call`` by name, compiled as a launch on ``target`` does, so that one finds them in the cache.

    (What :func:`build` compiles has the same code under another key.)
    """
    found, launch = [], JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **options)))

    with pretended(target), no_driver(target), mock.patch.object(JITFunction, "run", run):
        call()
    return found


@contextlib.contextmanager
def no_driver(target: str) -> Iterator[None]:
    """Triton takes a GPU to be there, which runs nothing."""
    active = driver._active
    driver.set_active(NoDriver(target))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        driver._active = active


class NoLauncher:
    """Launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, *args: Any) -> None: ...


class NoDriver:
    """What Triton asks of a driver, for a GPU that is not there."""

    launcher_cls = NoLauncher

    def __init__(self, target: str) -> None:
        self.target, self.utils = target, self

    def get_current_target(self) -> GPUTarget:
        return gpu_target(self.target)

    def get_current_device(self) -> str:
        return self.target  # by which Triton remembers the target

    def get_current_stream(self, device: str) -> int:
        return 0

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": SHARED[device]}


def gpu_target(target: str) -> GPUTarget:
    """Triton's name for "sm_90", "gfx942" and the like."""
    kind, _, number = target.partition("_")
    return GPUTarget("cuda", int(number), 32) if kind == "sm" else GPUTarget("hip", target, 64)


@functools.cache
def build(launch: Launch, target: str) -> Any:
    """The compiled kernel."""
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={place: [["tt.divisibility", 16]] for place in launch.aligned},
    )
    return triton.compile(source, target=gpu_target(target), options=dict(launch.options))


def use(compiled: Any) -> Use:
    """What it takes. On AMD ``stack`` counts spilled registers and private bytes."""
    if "cubin" in compiled.asm:
        text = _inspect("cuobjdump", compiled, "-res-usage")
        registers, stack = (sum(map(int, re.findall(rf"\b{name}:(\d+)", text))) for name in ("REG", "STACK"))
    else:
        text = compiled.asm["amdgcn"]
        registers = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
        stack = sum(map(int, re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)))
    return Use(compiled.metadata.shared, registers, stack)


def sass(compiled: Any) -> str:
    """The machine code of a kernel for NVIDIA."""
    return _inspect("nvdisasm", compiled)


def disassembler(name: str) -> Path | None:
    """cuobjdump or nvdisasm: Triton's own, or that of a CUDA toolkit."""
    found = shutil.which(name)
    return BUNDLED / name if (BUNDLED / name).exists() else Path(found) if found else None


def _inspect(name: str, compiled: Any, *options: str) -> str:
    tool = disassembler(name)
    if tool is None:
        raise FileNotFoundError(f"{name} comes with Triton's NVIDIA backend or with a CUDA toolkit; here is neither")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout
