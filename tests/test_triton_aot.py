"""Every kernel configuration compiles ahead of time without spills and within the shared memory of its target."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: TRITON_INTERPRET=1 is set", allow_module_level=True)

from lamkernels.bench.ahead import SHARED, build, disassembler, record, sass, use
from launches import launches, meta  # after the skips above

import lamkernels as lk
from lamkernels import functional
from lamkernels.nn import learned_codebook
from lamkernels.ops import triton_cosine
from lamkernels.ops.code_statistics import triton as statistics
from lamkernels.ops.codebook_upkeep import triton as upkeep
from lamkernels.ops.covariance import triton as covariances
from lamkernels.ops.finite_scalar_quantize import triton as scalar
from lamkernels.ops.lookup_free_quantize import triton as signs
from lamkernels.ops.nearest_code import triton as nearest
from lamkernels.ops.vector_quantize import triton as quantize
from lamkernels.ops.vector_quantize import triton_step
from lamkernels.ops.vector_quantize.gpu_step import ema_step, learned_step

TARGETS = (
    *("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"),
    *(pytest.param(target, marks=pytest.mark.exhaustive) for target in ("sm_86", "sm_89")),
)


def lookup(codes: int, dim: int, dtype: torch.dtype, precision: str = "default", rows: int = 10**6) -> None:
    nearest.nearest_code(meta(1, rows, dim, dtype=dtype), meta(1, codes, dim, dtype=dtype), "l2", precision, True)


def strided_lookup(codes: int, dim: int, dtype: torch.dtype, metric: str) -> None:
    """Of rows whose entries lie apart, as those of a feature map with channels first."""
    x = torch.empty_strided((1, 250_000, 4, dim), (0, 4 * dim, 1, 4), device="meta", dtype=dtype)
    nearest.nearest_code(x, meta(1, codes, dim, dtype=dtype), metric, "default", True)


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


def grouped(heads: int, codes: int, dim: int, strides: tuple[int, ...], gradient: str = "ste") -> None:
    """Forward and backward of rows (H, B, L, D) in groups."""
    x, codebook = torch.empty_strided((heads, 1024, 4, dim), strides, device="meta"), meta(heads, codes, dim)
    out = quantize.vector_quantize(x, codebook, None, None, "l2", "default", gradient)
    quantized, indices, loss, _, _, _, sums, num_rows, _ = out
    arguments = (x, quantized, indices, sums, num_rows, None, quantized, loss, loss, "l2", gradient)
    quantize.vector_quantize_backward(*arguments)


def train(rows: int, codes: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
    """A step that updates the moving averages, and its backward."""
    x, averages = meta(rows, dim, dtype=dtype).requires_grad_(), (meta(codes, dim), meta(codes), meta(codes, dim))
    quantized, _, loss = ema_step(triton_step, x, averages, "default", (0.8, 1e-5), 0.25)
    torch.autograd.grad((quantized, loss), x, (meta(rows, dim, dtype=dtype), meta()))


def learn(rows: int, codes: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
    """A step whose codebook is learned by its gradient."""
    x, codebook = meta(rows, dim, dtype=dtype).requires_grad_(), meta(codes, dim).requires_grad_()
    quantized, _, loss = learned_step(triton_step, x, codebook, "l2", "default", (0.25, 1.0))
    torch.autograd.grad((quantized, loss), (x, codebook), (meta(rows, dim, dtype=dtype), meta()))


def keep_up(codes: int, dim: int, dtype: torch.dtype) -> None:
    """Moving averages, and dead codes with a mask."""
    state = meta(codes, dim), meta(codes), meta(codes, dim)
    upkeep.moving_averages(meta(codes, dtype=torch.int64), meta(codes, dim), *state, 0.2, 1e-5)
    rows, mask = meta(1, 10**6, dim, dtype=dtype), meta(10**6, dtype=torch.bool)
    upkeep.replace_dead_codes(rows, mask, meta(dtype=torch.int64), *state, 1.0)


def normalise(codes: int, dim: int, dtype: torch.dtype, wanted: torch.dtype = torch.float32) -> None:
    """Forward and backward."""
    rows = meta(codes, dim, dtype=dtype).requires_grad_()
    torch.autograd.grad(triton_cosine.unit_or_nan(rows, wanted), rows, meta(codes, dim, dtype=wanted))


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


def plain_moments(dim: int, dtype: torch.dtype, precision: str = "default", rows: int = 10**6) -> None:
    """Of rows that all count: one scatter."""
    covariances.covariance(meta(1, rows, dim, dtype=dtype), None, None, 0, precision)


SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
SHORT: dict[str, Any] = {  # what a change is most likely to break
    "quantise 16 x 128": lambda: quantise(16, 128, SINGLE),
    "rotate 64 x 64": lambda: quantise(64, 64, SINGLE, gradient="rotation"),
    "train 8 x 32": lambda: train(256, 8, 32),
    "learn 8 x 32": lambda: learn(256, 8, 32),
    "keep up 64 x 16": lambda: keep_up(64, 16, SINGLE),
    "normalise 64 x 32": lambda: normalise(64, 32, SINGLE),
    "substitute 8 x 32, cosine": lambda: quantise(8, 32, SINGLE, metric="cosine", gradient="noise"),
    "quantise 64 x 64": lambda: quantise(64, 64, SINGLE),
    "quantise 64 x 64, bf16": lambda: quantise(64, 64, HALF),
    "quantise 2 x 64 x 16 in LAPO's layout": lambda: grouped(2, 64, 16, (64, 128, 1, 4)),
    "lookup 1024 x 64": lambda: lookup(1024, 64, SINGLE),
    "lookup 8192 x 256, bf16": lambda: lookup(8192, 256, HALF),
    "finite scalar 8 5 5 5": lambda: scalars([8, 5, 5, 5], SINGLE),
    "lookup-free 18": lambda: lookup_free(18, SINGLE),
    "moments 64": lambda: co_moments(64, SINGLE),
    "covariance 64": lambda: plain_moments(64, SINGLE),
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
        (8, 16), (64, 16), (64, 64), (256, 16), (512, 16), (256, 32), (64, 128), (1024, 16), (1024, 64), (1024, 128))},
    **{f"statistics {k} x {d}": functools.partial(count, k, d, SINGLE) for k, d in (
        (8, 32), (64, 64), (128, 16), (64, 128), (512, 16), (1024, 64), (8192, 300))},
    # rows whose length is no multiple of 16 are loaded entry by entry, and every entry has its address in registers
    **{f"quantise {k} x {d}": functools.partial(quantise, k, d, SINGLE) for k, d in (
        (10, 3), (16, 27), (60, 60), (16, 100), (60, 100), (250, 30), (500, 5), (1000, 100))},
    **{f"train {k} x {d}{name}": functools.partial(train, n, k, d, dtype) for n, k, d, name, dtype in (
        (1024, 64, 16, ", few rows", SINGLE), (65536, 64, 16, "", SINGLE), (65536, 1024, 64, "", SINGLE),
        (65536, 512, 16, ", bf16", HALF), (10**6, 16, 128, "", SINGLE))},
    **{f"learn {k} x {d}{name}": functools.partial(learn, n, k, d, dtype) for n, k, d, name, dtype in (
        (1024, 64, 16, ", few rows", SINGLE), (65536, 1024, 64, "", SINGLE), (65536, 512, 16, ", bf16", HALF),
        (10**6, 16, 128, "", SINGLE))},
    "keep up 1000 x 300, bf16": lambda: keep_up(1000, 300, HALF),
    **{f"normalise 1000 x {d}, {t} to {w}": functools.partial(normalise, 1000, d, t, w)
       for d in (7, 256, 300) for t, w in ((HALF, SINGLE), (SINGLE, DOUBLE))},
    "lookup 1000 x 100, bf16": lambda: lookup(1000, 100, HALF),
    "statistics 1000 x 100": lambda: count(1000, 100, SINGLE),
    **{f"{g} {k} x {d}, channels first": functools.partial(grouped, 1, k, d, (0, 4 * d, 1, 4), g)
       for k, d in ((16, 64), (16, 128), (64, 64), (64, 128), (256, 32), (1024, 32), (1024, 256))
       for g in ("ste", "rotation")},
    **{f"lookup {k} x {d}, channels first, {m}, {t}": functools.partial(strided_lookup, k, d, t, m)
       for k, d in ((8, 32), (16, 128), (64, 64)) for m in ("l2", "cosine") for t in (SINGLE, HALF)},
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
    "finite scalar 8 5 5 5, bf16": lambda: scalars([8, 5, 5, 5], HALF),
    "finite scalar 62 columns": lambda: scalars([2] * 62, SINGLE),
    "finite scalar 1000 levels, bf16": lambda: scalars([1000], HALF),
    "finite scalar, fp64": lambda: scalars([8, 8, 6, 5], DOUBLE),
    **{f"lookup-free {d}": functools.partial(lookup_free, d, SINGLE) for d in (1, 10, 16)},
    "lookup-free 16, bf16": lambda: lookup_free(16, HALF),
    "lookup-free 62": lambda: lookup_free(62, SINGLE),
    "lookup-free 10, bf16": lambda: lookup_free(10, HALF),
    "lookup-free 62, fp64": lambda: lookup_free(62, DOUBLE),
    "statistics, fp64": lambda: count(64, 300, DOUBLE),
    **{f"moments {d}": functools.partial(co_moments, d, SINGLE) for d in (1, 7, 20, 32, 100, 512, 2048)},
    **{f"moments {d}, bf16": functools.partial(co_moments, d, HALF) for d in (7, 32, 100, 512)},
    **{f"moments {d}, exact": functools.partial(co_moments, d, SINGLE, "exact") for d in (7, 20, 100, 512)},
    "moments 512, fp64": lambda: co_moments(512, DOUBLE),
    **{f"covariance {d}": functools.partial(plain_moments, d, SINGLE) for d in (1, 7, 20, 32, 100, 512, 2048)},
    **{f"covariance {d}, bf16": functools.partial(plain_moments, d, HALF) for d in (20, 64, 100, 512)},
    **{f"covariance {d}, exact": functools.partial(plain_moments, d, SINGLE, "exact") for d in (7, 20, 64)},
    "covariance 30, fp64": lambda: plain_moments(30, DOUBLE),
}  # fmt: skip
CASES = [*SHORT, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in LONG)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_no_spills_and_the_shared_memory_fits(case: str, target: str) -> None:
    for launch in record(target, {**SHORT, **LONG}[case]):
        compiled = build(launch, target)
        name = f"{launch.kernel.__name__} {dict(launch.constants)}"
        taken = use(compiled)
        assert taken.shared <= SHARED[target], name
        assert taken.stack == 0, name
        if target.startswith("sm"):
            assert not re.search(r"\b(?:LDL|STL)\b", sass(compiled)), name


WIDE_LOAD, WIDE_STORE = r"LDG\.E\.128", r"STG\.E\.128"
SINGLE_LOAD, SINGLE_STORE = r"LDG\.E(?:\.CONSTANT)? ", r"STG\.E "  # of four bytes
ASYNC_LOAD = r"LDGSTS\.E\.BYPASS\.128"  # cp.async of 16 bytes, past L1
TENSOR = r"\bH(?:G)?MMA\."
MACHINE_CODE = {  # on sm_90, by case and kernel: what has to be in it, and what must not
    # 16 rows are too few for a warpgroup's product, which takes 64
    ("quantise 16 x 128", "vector_quantize_fwd_kernel"): ([r"HMMA\.1688\.F32\.TF32", WIDE_LOAD, WIDE_STORE], []),
    # scores of 32 rows; sums by one-hot products of 64 codes
    ("quantise 64 x 64", "vector_quantize_fwd_kernel"): ([r"HMMA\.1688\.F32\.TF32", r"HGMMA\.64x32x8\.F32\.TF32"], []),
    ("quantise 64 x 64, bf16", "vector_quantize_fwd_kernel"): (
        [r"HMMA\.16816\.F32\.BF16", r"HGMMA\.64x32x8\.F32\.TF32", WIDE_LOAD, WIDE_STORE], []),
    ("quantise 64 x 64", "vector_quantize_bwd_kernel"): ([WIDE_LOAD, WIDE_STORE], [TENSOR]),
    ("lookup 1024 x 64", "nearest_code_streamed_kernel"): ([r"HGMMA\.64x64x8\.F32\.TF32", ASYNC_LOAD], [r"\bHMMA\."]),
    ("lookup 8192 x 256, bf16", "nearest_code_streamed_kernel"): (
        [r"HGMMA\.64x128x16\.F32\.BF16", ASYNC_LOAD], [r"\bHMMA\.", r"TF32"]),
    # the next tiles of rows are on their way while one is worked on
    ("lookup 64 x 64, bf16", "nearest_code_resident_kernel"): (
        [r"HGMMA\.64x\d+x16\.F32\.BF16", ASYNC_LOAD], [r"\bHMMA\."]),
    **{(case, "scatter_kernel"): ([r"HGMMA\.64x64x8\.F32\.TF32", ASYNC_LOAD, WIDE_STORE], [r"\bHMMA\."])
       for case in ("moments 64", "covariance 64")},
    **{("finite scalar 8 5 5 5" + t, f"finite_scalar_quantize_{p}_kernel"): (
        [WIDE_LOAD, WIDE_STORE], [SINGLE_LOAD, SINGLE_STORE]) for t in ("", ", bf16") for p in ("fwd", "bwd")},
    **{("lookup-free 16" + t, f"lookup_free_{p}_kernel"): ([WIDE_LOAD, WIDE_STORE], [SINGLE_STORE])
       for t in ("", ", bf16") for p in ("fwd", "bwd")},
    ("lookup-free 18", "lookup_free_fwd_kernel"): ([r"LDG\.E\.64", r"STG\.E\.64"], [SINGLE_LOAD, SINGLE_STORE]),
    ("lookup exact", "nearest_code_exact_kernel"): ([r"\bDFMA\b"], [TENSOR]),  # fp64, term by term
}  # fmt: skip


@pytest.mark.skipif(disassembler("nvdisasm") is None, reason="nvdisasm comes with Triton for NVIDIA or a CUDA toolkit")
def test_the_machine_code_has_matrix_products_and_wide_loads() -> None:
    for (case, kernel), (wanted, unwanted) in MACHINE_CODE.items():
        launch = next(one for one in record("sm_90", {**SHORT, **LONG}[case]) if one.kernel.__name__ == kernel)
        text = sass(build(launch, "sm_90"))
        missing = [pattern for pattern in wanted if not re.search(pattern, text)]
        found = [pattern for pattern in unwanted if re.search(pattern, text)]
        assert not missing and not found, f"{kernel} of {case}: lacks {missing}, has {found}"


@pytest.mark.skipif(disassembler("cuobjdump") is None, reason="cuobjdump comes with Triton or a CUDA toolkit")
def test_two_programs_of_a_streamed_lookup_share_a_multiprocessor() -> None:
    (launch,) = (one for one in record("sm_90", LONG["lookup 1024 x 64, bf16"]) if "streamed" in one.kernel.__name__)
    taken = use(build(launch, "sm_90"))
    assert 2 * taken.registers * 32 * dict(launch.options)["num_warps"] <= 2**16 and 2 * taken.shared <= SHARED["sm_90"]


STEP = ["vector_quantize_fwd_kernel", "merge_sums_kernel", "vector_quantize_bwd_kernel"]
READY = ["centred_codes_kernel", "relative_norms_kernel"]


@pytest.mark.parametrize(("rows", "codes", "dim"), [(256, 8, 32), (1024, 64, 16), (65536, 64, 16)])
def test_a_training_step_is_three_launches_and_no_operator_of_torch(rows: int, codes: int, dim: int) -> None:
    assert launches(lambda: train(rows, codes, dim)) == launches(lambda: learn(rows, codes, dim)) == (STEP, [])


def test_a_covariance_is_three_launches_and_no_operator_of_torch() -> None:
    assert launches(LONG["covariance 32"]) == (["shift_kernel", "scatter_kernel", "merge_kernel"], [])


def test_training_takes_three_launches() -> None:
    assert launches(lambda: grouped(2, 64, 16, (64, 128, 1, 4))) == (STEP, [])  # of two codebooks too
    x, codebook = meta(1024, 16).requires_grad_(), meta(64, 16).requires_grad_()

    def step() -> None:
        out = lk.vector_quantize(x, codebook, backend="triton")
        torch.autograd.grad(
            (out.quantized, out.commitment_loss, out.codebook_loss), x, (meta(1024, 16), meta(), meta())
        )

    assert launches(step) == (STEP, [])


def test_what_the_module_launches_beside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_codebook, "gpu_upkeep", lambda *_, **__: upkeep)  # what a GPU would take
    monkeypatch.setattr(
        lk.VectorQuantize,
        "_gpu_kernels",
        lambda self, _: triton_step if self.metric == "l2" and self.gradient == "ste" else None,
    )
    x = meta(256, 32).requires_grad_()

    def step(**options: Any) -> tuple[list[str], list[str]]:
        vq = lk.VectorQuantize(32, 8, device="meta", backend="triton", **options)

        def run() -> None:
            quantized, _, loss = vq(x)
            torch.autograd.grad((quantized, loss), x, (meta(256, 32), meta()))

        return launches(run)

    assert step(commitment_weight=0.25) == (STEP, [])
    assert step(dead_code_threshold=1.0) == ([*STEP[:2], "replace_dead_codes_kernel", STEP[2]], ["add_"])
    averages = [*STEP[:2], "moving_averages_kernel"]
    assert step(gradient="rotation") == ([*averages, "by_row_bwd_kernel"], ["clone", "clamp"])
    monkeypatch.setattr(functional, "gpu_cosine", lambda *_, **__: triton_cosine)
    assert step(metric="cosine") == (["unit_rows_kernel", *averages, "by_row_bwd_kernel"], ["clone", "clamp"])
    assert step(metric="cosine", update="gradient") == (
        ["unit_rows_kernel", *STEP[:2], "by_row_bwd_kernel"],
        ["add", "clamp"],
    )
    assert step(update="gradient", gradient="rotation") == ([*STEP[:2], "by_row_bwd_kernel"], ["add", "clamp"])
    monkeypatch.setattr(functional, "gpu_learned", lambda *_, **__: triton_step)
    assert step(update="gradient", commitment_weight=0.25) == (STEP, [])
    kernels, operators = step(dead_code_threshold=1.0, health=lk.CodebookHealth(8, device="meta"))
    assert kernels == [*averages, "replace_dead_codes_kernel", STEP[2]]
    assert operators == ["clone", "add_", "sum", "ones_like", "stack", "cat", "add_", "clamp"]


def test_public_functions_launch_nothing_beside_the_kernels() -> None:
    for rows, codes, dim, dtype in ((2**20, 8, 16, HALF), (273_000, 64, 16, HALF), (2**20, 64, 64, HALF)):
        x, codebook = meta(rows, dim, dtype=dtype), meta(codes, dim, dtype=dtype)
        found = launches(functools.partial(lk.nearest_code, x, codebook, backend="triton"))
        assert found == (["nearest_code_resident_kernel"], [])
    for rows, codes, dim in ((2**20, 256, 128), (2**20, 1024, 64), (2**18, 8192, 256), (2**20, 65536, 128)):
        x, codebook = meta(rows, dim, dtype=HALF), meta(codes, dim, dtype=HALF)
        found = launches(functools.partial(lk.nearest_code, x, codebook, backend="triton"))
        assert found == ([*READY, "nearest_code_streamed_kernel"], [])
    found = launches(lambda: lk.vector_quantize(meta(2**20, 128), meta(16, 128), backend="triton"))
    assert found == (STEP[:2], [])
