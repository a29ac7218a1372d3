"""Every kernel configuration compiles ahead of time without spills and within the shared memory of its target.

The launchers run on meta tensors with the launch replaced by a recorder, so that what is compiled here is what
tuning.py picks for that target, shape and dtype, and nothing else.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: TRITON_INTERPRET=1 is set", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402  # after the skips above
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from lamkernels import tuning  # noqa: E402
from lamkernels.ops.code_statistics import triton as statistics  # noqa: E402
from lamkernels.ops.covariance import triton as covariances  # noqa: E402
from lamkernels.ops.finite_scalar_quantize import triton as scalar  # noqa: E402
from lamkernels.ops.lookup_free_quantize import triton as signs  # noqa: E402
from lamkernels.ops.nearest_code import triton as nearest  # noqa: E402
from lamkernels.ops.vector_quantize import triton as quantize  # noqa: E402

KB = 1024
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {  # target, bytes of shared memory a program may use
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KB),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KB),
}
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip


class Launch(NamedTuple):
    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int], Any], ...]
    aligned: tuple[tuple[int], ...]
    options: tuple[tuple[str, int], ...]


def record(monkeypatch: pytest.MonkeyPatch, target: str, call: Any) -> list[Launch]:
    """The launches of ``call`` as they would be made on ``target``."""
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
            elif isinstance(arg, float):
                signature.append((param.name, "fp32"))
            else:
                signature.append((param.name, "i64" if arg >= 2**31 else "i32"))
                if arg % 16 == 0:
                    aligned.append((i,))
        launches.append(Launch(self, tuple(signature), tuple(constants), tuple(aligned), tuple(options.items())))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(tuning, "target_of", lambda device: target)
    for module in (nearest, quantize, statistics, covariances):
        monkeypatch.setattr(module, "persistent_programs", lambda device: 528)
    call()
    return launches


@functools.cache
def build(launch: Launch, target: str) -> Any:
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={place: [["tt.divisibility", 16]] for place in launch.aligned},
    )
    return triton.compile(source, target=TARGETS[target][0], options=dict(launch.options))


def sass(compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([BIN / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout


def stack_bytes(compiled: Any) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    return sum(int(size) for size in re.findall(r"STACK:(\d+)", usage.stdout))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def lookup(codes: int, dim: int, dtype: torch.dtype, precision: str = "default", rows: int = 10**6) -> None:
    nearest.nearest_code(meta(1, rows, dim, dtype=dtype), meta(1, codes, dim, dtype=dtype), "l2", precision, True)


def quantise(
    codes: int, dim: int, dtype: torch.dtype, rows: int = 10**6, metric: str = "l2", gradient: str = "ste"
) -> None:
    """Forward with a mask, and backward."""
    x, codebook = meta(1, rows, dim, dtype=dtype), meta(1, codes, dim, dtype=dtype)
    mask = meta(1, rows, dtype=torch.bool)
    noise = meta(1, rows, dim, dtype=dtype) if gradient == "noise" else None
    out = quantize.vector_quantize(x, codebook, mask, noise, metric, "default", gradient)
    quantized, indices, loss, _, _, _, sums, num_rows, _ = out
    arguments = (x, quantized, indices, sums, num_rows, noise, quantized, loss, loss, metric, gradient)
    quantize.vector_quantize_backward(*arguments)


def count(codes: int, dim: int, dtype: torch.dtype) -> None:
    statistics.code_statistics(meta(1, 10**6, dim, dtype=dtype), meta(1, 10**6, dtype=torch.int64), codes)


def scalars(levels: list[int], dtype: torch.dtype, rows: int = 10**6) -> None:
    """Forward and backward."""
    x = meta(1, rows, len(levels), dtype=dtype)
    quantized, indices = scalar.finite_scalar_quantize(x, levels, False)
    scalar.finite_scalar_quantize_backward(x, indices, quantized, levels, False)


def lookup_free(dim: int, dtype: torch.dtype, rows: int = 10**6) -> None:
    """Forward with a mask, and backward."""
    x, mask = meta(1, rows, dim, dtype=dtype), meta(1, rows, dtype=torch.bool)
    quantized, indices, commitment, entropy, num_rows = signs.lookup_free_quantize(x, mask, 1.0, 400.0, True)
    signs.lookup_free_quantize_backward(x, indices, num_rows, quantized, commitment, entropy, 1.0, 400.0, True)


def co_moments(dim: int, dtype: torch.dtype, precision: str = "default", rows: int = 10**6) -> None:
    """Of lagged rows with weights: all of the scatters."""
    weights = meta(1, rows - 1, dtype=torch.float64)
    covariances.covariance(meta(1, rows, dim, dtype=dtype), None, weights, 1, precision)


SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
SHORT: dict[str, Any] = {  # what a change is most likely to break
    "quantise 16 x 128": lambda: quantise(16, 128, SINGLE),
    "rotate 64 x 64": lambda: quantise(64, 64, SINGLE, gradient="rotation"),
    "substitute 8 x 32, cosine": lambda: quantise(8, 32, SINGLE, metric="cosine", gradient="noise"),
    "quantise 64 x 64": lambda: quantise(64, 64, SINGLE),
    "quantise 64 x 64, bf16": lambda: quantise(64, 64, HALF),
    "lookup 1024 x 64": lambda: lookup(1024, 64, SINGLE),
    "lookup 8192 x 256, bf16": lambda: lookup(8192, 256, HALF),
    "finite scalar 8 5 5 5": lambda: scalars([8, 5, 5, 5], SINGLE),
    "lookup-free 18": lambda: lookup_free(18, SINGLE),
    "moments 64": lambda: co_moments(64, SINGLE),
}
LONG: dict[str, Any] = {  # every branch of tuning.py
    **{f"quantise {k} x {d}": functools.partial(quantise, k, d, SINGLE) for k, d in (
        (8, 16), (8, 32), (16, 64), (32, 64), (128, 16), (32, 128), (256, 16), (64, 128), (256, 32), (512, 16))},
    **{f"quantise {k} x {d}, bf16": functools.partial(quantise, k, d, HALF) for k, d in (
        (8, 16), (16, 128), (64, 128), (512, 16))},
    **{f"quantise {k} x {d}, few rows": functools.partial(quantise, k, d, SINGLE, 1000) for k, d in (
        (8, 16), (8, 32), (64, 16))},
    **{f"lookup {k} x {d}": functools.partial(lookup, k, d, SINGLE) for k, d in (
        (8, 32), (64, 64), (16, 128), (64, 128), (512, 16), (1024, 32), (8192, 256))},
    **{f"lookup {k} x {d}, bf16": functools.partial(lookup, k, d, HALF) for k, d in (
        (8, 16), (64, 64), (256, 32), (64, 128), (1024, 64))},
    **{f"statistics {k} x {d}": functools.partial(count, k, d, SINGLE) for k, d in (
        (8, 32), (64, 64), (128, 16), (64, 128), (512, 16), (1024, 64), (8192, 300))},
    # rows whose length is no multiple of 16 are loaded entry by entry, and every entry has its address in registers
    **{f"quantise {k} x {d}": functools.partial(quantise, k, d, SINGLE) for k, d in (
        (10, 3), (16, 27), (60, 60), (16, 100), (60, 100), (250, 30), (500, 5), (1000, 100))},
    "lookup 1000 x 100, bf16": lambda: lookup(1000, 100, HALF),
    "statistics 1000 x 100": lambda: count(1000, 100, SINGLE),
    "lookup exact": lambda: lookup(64, 64, SINGLE, "exact"),
    "lookup fast": lambda: lookup(1024, 64, SINGLE, "fast"),
    **{f"{g} 16 x 128, {m}": functools.partial(quantise, 16, 128, SINGLE, metric=m, gradient=g)
       for g in ("ste", "rotation", "noise") for m in ("cosine", "dot")},
    **{f"{g} 1024 x 300, cosine, bf16": functools.partial(quantise, 1024, 300, HALF, metric="cosine", gradient=g)
       for g in ("rotation", "noise")},
    "noise 64 x 128, cosine, bf16": lambda: quantise(64, 128, HALF, metric="cosine", gradient="noise"),
    "rotate, fp64": lambda: quantise(64, 64, DOUBLE, gradient="rotation"),
    "quantise 1024 x 64": lambda: quantise(1024, 64, SINGLE),
    "quantise 1024 x 300, bf16": lambda: quantise(1024, 300, HALF),
    "quantise, fp64": lambda: quantise(64, 64, DOUBLE),
    "finite scalar 62 columns": lambda: scalars([2] * 62, SINGLE),
    "finite scalar 1000 levels, bf16": lambda: scalars([1000], HALF),
    "finite scalar, fp64": lambda: scalars([8, 8, 6, 5], DOUBLE),
    "lookup-free 1": lambda: lookup_free(1, SINGLE),
    "lookup-free 62": lambda: lookup_free(62, SINGLE),
    "lookup-free 10, bf16": lambda: lookup_free(10, HALF),
    "lookup-free 62, fp64": lambda: lookup_free(62, DOUBLE),
    "statistics, fp64": lambda: count(64, 300, DOUBLE),
    **{f"moments {d}": functools.partial(co_moments, d, SINGLE) for d in (1, 7, 20, 32, 100, 512, 2048)},
    **{f"moments {d}, bf16": functools.partial(co_moments, d, HALF) for d in (7, 32, 100, 512)},
    **{f"moments {d}, exact": functools.partial(co_moments, d, SINGLE, "exact") for d in (7, 20, 100, 512)},
    "moments 512, fp64": lambda: co_moments(512, DOUBLE),
}  # fmt: skip
CASES = [*SHORT, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in LONG)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_no_spills_and_the_shared_memory_fits(case: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in record(monkeypatch, target, {**SHORT, **LONG}[case]):
        compiled = build(launch, target)
        name = f"{launch.kernel.__name__} {dict(launch.constants)}"
        assert compiled.metadata.shared <= TARGETS[target][1], name
        if target.startswith("sm"):
            assert stack_bytes(compiled) == 0, name
            assert not re.search(r"\b(?:LDL|STL)\b", sass(compiled)), name
        else:
            spills = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"])
            assert set(spills) == {"0"}, name


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32 as tf32x3", "bf16"])
def test_the_streamed_lookup_uses_wgmma(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    main = record(monkeypatch, "sm_90", lambda: lookup(8192, 256, dtype))[-1]
    assert main.kernel.__name__ == "nearest_code_streamed_kernel"
    assert "HGMMA" in sass(build(main, "sm_90"))


def test_training_takes_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(record(monkeypatch, "sm_90", lambda: quantise(64, 16, SINGLE, 1024))) == 3
