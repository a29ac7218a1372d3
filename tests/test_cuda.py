"""The CUDA C++ kernels without a GPU: their machine code, and what their source computes on a CPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from contract import HARD_DATA, assert_contract, hard_data
from contract import scores as exact_scores
from cuda_cases import Host, host
from step_cases import assert_steps_of_the_module
from torch import Tensor
from triton_cases import assert_quantized_like, more_hard_data, thrown_out

import lamkernels as lk
from lamkernels import tuning
from lamkernels.ops import cuda_common
from lamkernels.ops.code_statistics import cuda as statistics
from lamkernels.ops.code_statistics import reference as statistics_reference
from lamkernels.ops.covariance import cuda as covariance
from lamkernels.ops.covariance import reference as covariance_reference
from lamkernels.ops.nearest_code import cuda as nearest
from lamkernels.ops.nearest_code import cuda_hopper as hopper
from lamkernels.ops.nearest_code import reference as nearest_reference
from lamkernels.ops.vector_quantize import cuda, reference
from lamkernels.ops.vector_quantize.gpu_step import ema_step

__all__ = ["host"]

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
PAIRS = ((SINGLE, SINGLE), (BRAIN, SINGLE), (HALF, HALF), (BRAIN, BRAIN), (HALF, SINGLE))  # of rows and codes
WIDTHS = ((BRAIN, 64), (HALF, 256), (HALF, 128), (BRAIN, 24), (BRAIN, 136))  # of rows
COMPILED = [
    *((cuda.SOURCE, cuda_common.types(*pair), target) for target in ("sm_80", "sm_90a", "sm_100") for pair in PAIRS),
    *((hopper.SOURCE, hopper.defines(*width), "sm_90a") for width in WIDTHS),
    (covariance.SOURCE, covariance.DEFINES, "sm_90a"),
]
MORE = more_hard_data()


def is_short(source: str, defines: tuple[str, ...], target: str) -> bool:
    """Whether this is not left to the exhaustive run."""
    firsts = [c for c in COMPILED if c[0] == source and c[2] == target]
    return (source, defines, target) in firsts[: 2 if source == hopper.SOURCE else 1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, of the CUDA toolkit, is not installed")
@pytest.mark.parametrize(
    ("source", "defines", "target"),
    [pytest.param(*c, marks=() if is_short(*c) else pytest.mark.exhaustive) for c in COMPILED],
)
def test_every_kernel_compiles_without_spills_or_local_memory(
    source: str, defines: tuple[str, ...], target: str, tmp_path: Path
) -> None:
    text = cuda_common.source_text(source)
    assert not re.search(r"#include|__builtin_", text), "NVRTC, which compiles it, has neither"
    (tmp_path / source).write_text(text)
    command = ["nvcc", "-std=c++17", "--fmad=false", "-cubin", f"-arch={target}", "-Xptxas=-v", *defines]
    done = subprocess.run(
        [*command, tmp_path / source, "-o", tmp_path / "out.cubin"], capture_output=True, text=True, check=True
    )
    kernels = re.findall(r'extern "C" __global__', text)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(used) == len(kernels) > 0, done.stderr
    assert all(set(numbers) == {"0"} for numbers in used), done.stderr
    assert "wgmma" not in done.stderr, f"products do not run beside what follows them: {done.stderr}"


def test_every_source_is_compiled() -> None:
    assert {source for source, _, _ in COMPILED} == {
        path.name for path in Path(cuda_common.__file__).parents[2].glob("csrc/*.cu")
    }


@pytest.mark.parametrize("precision", ["default", "exact"])
def test_hard_data_keeps_the_contract(host: Host, precision: str) -> None:
    tried = 0
    for name in [*HARD_DATA, *MORE]:
        x, codebook = MORE[name] if name in MORE else hard_data(name)
        x = x[:500]
        if not cuda.fits(*codebook.shape, x.device):
            continue
        tried += 1
        indices, distance = nearest.nearest_code(x[None], codebook[None], "l2", precision, True)
        assert_contract(x, codebook, indices[0], precision=precision)
        if name.startswith("integer"):
            assert torch.equal(indices[0], exact_scores(x, codebook).argmin(-1)), name
        best = (x.double() - codebook.double()[indices[0].clamp(min=0)]).square().sum(-1).float()
        chosen = torch.where(indices[0] >= 0, best, torch.nan)
        torch.testing.assert_close(distance[0], chosen, rtol=1e-5, atol=0, equal_nan=True)
    x, codebook, expected = thrown_out()
    assert nearest.nearest_code(x[None], codebook[None], "l2", precision, False)[0][0].tolist() == expected.tolist()
    assert tried >= 17


@pytest.mark.parametrize(("dtype", "dim"), [(BRAIN, 24), (HALF, 64), (BRAIN, 256)], ids=str)
def test_many_codes_keep_the_contract_whenever_copies_and_products_come(
    host: Host, dtype: torch.dtype, dim: int
) -> None:
    x, codebook = torch.randn(2, 265, dim).to(dtype), torch.randn(2, 260, dim).to(dtype)
    codebook[0, 17], codebook[1, 40, 3] = codebook[0, 200], torch.nan
    x[0, 3, 1], x[1, 7], x[1, 8] = torch.nan, -torch.inf, torch.finfo(dtype).max
    x[0, 258:264] = codebook[0, 200]
    grid = torch.randint(-2, 3, (1, 60, dim)).to(dtype), torch.randint(-2, 3, (1, 300, dim)).to(dtype)
    tiny = (torch.randn(1, 8, dim) * torch.finfo(dtype).tiny / 4).to(dtype)  # subnormal numbers
    for seed, metric in ((None, "l2"), (1, "dot"), (2, "l2")):
        host.shuffle(seed)
        for rows, codes in ((x, codebook), grid, (tiny, codebook[:1])):
            indices, distance = nearest.nearest_code(rows, codes, metric, "default", True)
            want, best = nearest_reference.nearest_code(rows, codes, metric, "exact", True)
            for head in range(len(rows)):
                assert_contract(rows[head], codes[head], indices[head], metric=metric)
            if rows is grid[0]:
                assert torch.equal(indices, want)
            same = indices == want
            torch.testing.assert_close(distance[same], best[same].float(), rtol=1e-5, atol=0, equal_nan=True)
    host.shuffle(None)
    assert nearest.nearest_code(x[:, :5], torch.full_like(codebook, torch.nan), "l2", "default", False)[0].eq(-1).all()
    assert host.launches[-4:] == ["ready_codes", "ready_norms", "nearest_code", "finish_rows"]


def test_many_codes_read_rows_where_they_lie(host: Host) -> None:
    codebook = torch.randn(2, 300, 24).to(BRAIN)
    for rows in (
        torch.randn(2, 5, 60, 24),
        torch.randn(2, 60, 24, 5).permute(0, 3, 1, 2),
        torch.randn(2, 90, 28)[..., 1:25],
    ):
        x = rows.to(BRAIN)
        found = nearest.nearest_code(x, codebook, "l2", "default", False)[0]
        plain = x.reshape(2, -1, 24)
        for head in range(2):
            assert_contract(plain[head], codebook[head], found[head])


def relative(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """The error (Frobenius) relative to the norm of ``want``, or to ``scale``."""
    return float((got - want).norm() / (want.norm() if scale is None else scale))


@pytest.mark.parametrize("seed", [None, 1])
def test_covariances_keep_their_accuracy_whenever_products_come(host: Host, seed: int | None) -> None:
    host.shuffle(seed)
    for heads, rows, dim, other, lag, weighted, mean, bound in (
        (1, 8300, 20, None, 0, False, 10.0, 1e-6),  # more rows than are added up in fp32
        (2, 900, 132, None, 0, True, 3.0, 5e-6),
        (1, 500, 260, None, 1, False, 1.0, 5e-6),
        (1, 333, 24, 300, 0, True, -2.0, 5e-6),
        (1, 900, 8, None, 0, True, 0.5, 1.5e-6),
    ):
        x = torch.randn(heads, rows, dim) + mean
        y = None if other is None else torch.randn(heads, rows, other) + 2 * x[..., :1]
        weights = 1000 * torch.rand(heads, max(rows - lag, 0), dtype=torch.float64) if weighted else None
        if weights is not None:
            x[0, 5, 3], weights[:, 7] = torch.nan, 0.0
        got = covariance.covariance(x, y, weights, lag, "default")
        want = covariance_reference.covariance(x, y, weights, lag, "default")
        assert torch.equal(got[0], want[0]) or relative(got[0], want[0]) < 1e-14
        assert relative(got[1], want[1]) < 1e-6 and torch.equal(got[3], got[3].transpose(1, 2))
        assert relative(got[3], want[3]) < bound
        if want[5].numel():
            assert relative(got[2], want[2]) < 1e-6 and relative(got[5], want[5]) < bound
            assert relative(got[4], want[4], (want[3].norm() * want[5].norm()).sqrt()) < bound
    still = torch.randn(1, 3000, 24)  # columns of different rows that are equal: the products of low halves add up
    both = (covariance.covariance, covariance_reference.covariance)
    assert relative(*(compute(still, still.flip(2), None, 0, "default")[4] for compute in both)) < 1e-6
    few_values = torch.randint(0, 5, (1, 700, 200)).float()  # of which low halves would not average out
    got = covariance.covariance(few_values, None, None, 0, "default")[3]
    assert relative(got, covariance_reference.covariance(few_values, None, None, 0, "default")[3]) < 1e-7
    for found in covariance.covariance(torch.full((1, 8, 4), torch.nan), None, None, 0, "default"):
        assert not found.any()


def test_covariances_of_strided_rows_and_of_none(host: Host) -> None:
    x = torch.randn(1, 80, 45)[:, ::2, 1:41]
    got, want = (f(x, None, None, 2, "default") for f in (covariance.covariance, covariance_reference.covariance))
    assert all(relative(a, b) < 5e-6 for a, b in zip(got, want, strict=True))
    for empty in (torch.randn(1, 0, 8), torch.randn(1, 3, 8)):
        assert not any(t.any() for t in covariance.covariance(empty, None, None, 5, "default"))
    for rows, y, precision, message in (
        (x.double(), None, "default", "float64"),
        (x, None, "exact", "'exact'"),
        (torch.randn(1, 9, 6), None, "default", "multiple of 4"),
        (x, torch.randn(1, 40, 3), "default", "multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            covariance.covariance(rows, y, None, 0, precision)


def test_ranges_of_rows_fill_a_gpu() -> None:
    for dim, multiprocessors in ((2048, 132), (1024, 132), (512, 132), (64, 132), (2048, 114)):
        tiles = covariance.num_tiles(dim, dim, True)
        splits = tuning.splits(tiles, 10**6 // 128, multiprocessors)
        waves = tiles * splits / multiprocessors
        assert waves <= tuning.MOST_WAVES and waves / -(-tiles * splits // multiprocessors) >= 0.9, (dim, splits)
    assert covariance.num_tiles(2048, 2048, True) == 72 and tuning.splits(72, 5 * 10**6 // 128, 132) == 11
    assert tuning.splits(3, 0, 132) == 1


def rows_and_codes(rows: int, codes: int, dim: int, pair: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    """(2, N, D) and (2, K, D), each row next to its code, so that rounding decides nothing; some rows not finite."""
    codebook = torch.randn(2, codes, dim).to(pair[1])
    x = (codebook[:, torch.arange(rows) % codes] * 1.01).to(pair[0])
    if rows > 3:
        x[0, rows // 2], x[1, rows // 3, dim - 1] = torch.nan, -torch.inf
    return x, codebook


SHAPES = [(0, 3, 4), (1, 1, 1), (33, 5, 3), (70, 8, 32), (100, 20, 12), (130, 64, 17), (1100, 3, 8)]


@pytest.mark.parametrize("pair", PAIRS[:3], ids=str)
def test_both_passes_agree_with_the_specification_in_any_order(
    host: Host, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    for rows, codes, dim in SHAPES:
        x, codebook = rows_and_codes(rows, codes, dim, pair)
        mask = torch.arange(2 * rows).view(2, rows) % 5 != 3
        gradient = torch.randn(2, rows, 1).to(x.dtype).expand(x.shape)  # strides that a sum sends back
        for metric in ("l2", "dot"):
            if metric == "dot":  # of equal length, so that the nearest is also the one of the largest product
                codebook = torch.nn.functional.normalize(codebook.double(), dim=-1).to(pair[1])
                x = (codebook[:, torch.arange(rows) % codes] * 1.01).to(pair[0])
            found = []
            losses = torch.rand(2), torch.tensor(0.5).expand(2)
            for seed in (None, 1, 2):
                host.shuffle(seed)
                out = cuda.vector_quantize(x, codebook, mask, None, metric, "default", "ste")
                arguments = (x, out[0], out[1], out[6], out[7], None, gradient, *losses, metric, "ste")
                back = cuda.vector_quantize_backward(*arguments)
                found.append((*out, *back))
            host.shuffle(None)
            want = reference.vector_quantize(x, codebook, mask, None, metric, "default", "ste")
            assert_quantized_like(out, want)
            for a, b in zip(back, reference.vector_quantize_backward(*arguments), strict=True):
                torch.testing.assert_close(a, b)
            for other in found[:2]:
                same = (torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(found[2], other, strict=True))
                assert all(same), "the order of blocks or threads shows"


def test_rows_are_read_where_they_lie(host: Host) -> None:
    x = torch.randn(2, 6, 20, 5)  # (H, D, B, L): the layout of feature maps
    codebook = torch.randn(2, 7, 12)[..., :6]
    grouped = x.permute(0, 2, 3, 1)
    out = cuda.vector_quantize(grouped, codebook, None, None, "l2", "default", "ste")
    assert_quantized_like(out, reference.vector_quantize(grouped, codebook, None, None, "l2", "default", "ste"))
    ones = torch.ones(2)
    arguments = (grouped, out[0], out[1], out[6], out[7], None, out[0], ones, ones, "l2", "ste")
    for a, b in zip(
        cuda.vector_quantize_backward(*arguments), reference.vector_quantize_backward(*arguments), strict=True
    ):
        torch.testing.assert_close(a, b)
    every_other = torch.randn(1, 50, 24)[:, ::2, ::2]
    assert_quantized_like(
        cuda.vector_quantize(every_other, every_other[:, :4], None, None, "l2", "exact", "ste"),
        reference.vector_quantize(every_other, every_other[:, :4], None, None, "l2", "exact", "ste"),
    )


def test_statistics_of_given_indices(host: Host) -> None:
    x = torch.randn(2, 90, 7)
    x[0, 5] = torch.inf
    indices = torch.randint(-2, 11, (90, 2)).t()
    counts, sums = statistics.code_statistics(x, indices, 9)
    want = statistics_reference.code_statistics(x, indices, 9)
    assert torch.equal(counts, want[0])
    torch.testing.assert_close(sums, want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_a_step_with_its_averages_is_that_of_the_module(host: Host, dtype: torch.dtype) -> None:
    for rows, codes, dim in ((64, 8, 32), (200, 70, 10), (0, 3, 4)):
        assert_steps_of_the_module(cuda, rows, codes, dim, dtype, 1e-7)


def test_a_step_is_two_launches(host: Host) -> None:
    codebook, x = torch.randn(5, 4), torch.randn(40, 4, requires_grad=True)
    host.launches.clear()
    quantized, _, loss = ema_step(cuda, x, (codebook, torch.ones(5), codebook.clone()), "default", (0.8, 1e-5), 1.0)
    (quantized.sum() + loss).backward()
    assert host.launches == ["vector_quantize_fwd", "vector_quantize_bwd"]


class FakeCuPy(types.ModuleType):
    """As much of CuPy as a launch uses, over the kernels on the CPU; ``raw`` are the files that were loaded."""

    def __init__(self, host: Host) -> None:
        super().__init__("cupy")
        self.host, self.raw, self.entered = host, [], 0
        stream = type("Stream", (), {"from_external": staticmethod(self._stream)})
        self.cuda = types.SimpleNamespace(Stream=stream)

    def RawModule(self, *, path: str) -> Any:
        source, options = json.loads(Path(path).read_text().rstrip("\0"))
        self.raw.append((source, options))
        defines = tuple(option for option in options if option.startswith("-D"))

        def function(name: str) -> Any:
            kernel = mock.Mock(max_dynamic_shared_size_bytes=0)

            def call(grid: tuple[int], block: tuple[int], arguments: tuple[Any], *, shared_mem: int) -> None:
                assert self.entered == 1 and arguments[0].size == 1
                assert shared_mem <= 48 * 1024 or shared_mem <= kernel.max_dynamic_shared_size_bytes
                data = arguments[0].tobytes()
                self.host.launch(name, source, defines, *grid, data, shared_mem, torch.device("cpu"), *block)

            kernel.side_effect = call
            return kernel

        return types.SimpleNamespace(get_function=function)

    def _stream(self, stream: Any) -> Any:
        assert stream.cuda_stream == 7
        return self

    def __enter__(self) -> None:
        self.entered += 1

    def __exit__(self, *_: object) -> None:
        self.entered -= 1


class FakeNVRTC(types.ModuleType):
    """Compiles a source to its name and the options."""

    class NVRTCError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("nvrtc")
        self.compiled: list[tuple[str, str, tuple[str, ...]]] = []

    def getVersion(self) -> tuple[int, int]:
        return (13, 0)

    def getSupportedArchs(self) -> tuple[int, ...]:
        return (80, 90, 100)

    def createProgram(self, text: str, name: str, headers: tuple[str, ...], names: tuple[str, ...]) -> list[Any]:
        return [text, name]

    def compileProgram(self, program: list[Any], options: tuple[str, ...]) -> None:
        if "broken" in program[0]:
            raise self.NVRTCError
        program.append(options)
        self.compiled.append((program[0], program[1], options))

    def getCUBIN(self, program: list[Any]) -> bytes:
        return json.dumps(program[1:]).encode()

    getPTX = getCUBIN  # noqa: N815  # as in NVRTC

    def getProgramLog(self, program: list[Any]) -> str:
        return "line 1: no"

    def destroyProgram(self, program: list[Any]) -> None:
        program.clear()


@pytest.fixture
def nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNVRTC:
    """The compiler that CuPy brings, with an empty cache."""
    found = FakeNVRTC()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", found)
    return found


@pytest.fixture
def fake_gpu(host: Host, nvrtc: FakeNVRTC) -> Iterator[FakeCuPy]:
    """A GPU whose kernels run on CPU tensors, behind everything that a launch calls."""
    stream = type("Stream", (), {"cuda_stream": 7, "device_index": 0, "__cuda_stream__": None})()
    cupy = FakeCuPy(host)
    cached = (cuda_common._function, cuda_common._module, cuda_common._stream, cuda_common._tickets)
    with (
        mock.patch.dict("sys.modules", {"cupy": cupy}),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(hopper, "launch", cuda_common.launch),
        mock.patch.object(cuda, "launch", cuda_common.launch),
        mock.patch.object(cuda, "tickets", cuda_common.tickets),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: stream),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch.cuda, "device"),
    ):
        yield cupy
    for function in cached:
        function.cache_clear()


def test_a_launch_goes_through_cupy(fake_gpu: FakeCuPy, nvrtc: FakeNVRTC) -> None:
    x, codebook = rows_and_codes(70, 64, 240, (SINGLE, SINGLE))
    want = reference.vector_quantize(x, codebook, None, None, "l2", "default", "ste")
    for _ in range(2):
        assert_quantized_like(cuda.vector_quantize(x, codebook, None, None, "l2", "default", "ste"), want)
    x, codebook = rows_and_codes(70, 300, 24, (BRAIN, BRAIN))
    found = nearest.nearest_code(x, codebook, "l2", "default", False)[0]
    assert torch.equal(found, nearest_reference.nearest_code(x, codebook, "l2", "exact", False)[0])
    options = [dict.fromkeys(options) for _, options in fake_gpu.raw]  # each loaded once
    assert [source for source, _ in fake_gpu.raw] == [cuda.SOURCE, hopper.SOURCE]
    assert all("--fmad=false" in option and not any("ftz" in o for o in option) for option in options)
    assert "-arch=sm_90" in options[0] and "-arch=sm_90a" in options[1]


def test_what_is_compiled_is_kept(nvrtc: FakeNVRTC, tmp_path: Path) -> None:
    defines = cuda_common.types(BRAIN, SINGLE)
    first = cuda_common.compiled(cuda.SOURCE, defines, (9, 0))
    assert first == cuda_common.compiled(cuda.SOURCE, defines, (9, 0)) and first.parent == tmp_path / "cache"
    assert first.read_bytes()[-1:] == b"\0", "the byte that CuPy cuts off is missing"
    ((text, name, options),) = nvrtc.compiled
    assert name == cuda.SOURCE and text.endswith(cuda_common.read_source(cuda.SOURCE)) and set(defines) < set(options)
    newer = cuda_common.compiled(cuda.SOURCE, defines, (12, 0))  # than this NVRTC knows: compiled by the driver
    assert newer.suffix == ".ptx" and "-arch=compute_100" in nvrtc.compiled[1][2]
    assert [p.suffix for p in sorted(first.parent.iterdir())].count(".cubin") == 1
    with (
        mock.patch.object(cuda_common, "read_source", lambda name: "broken"),
        pytest.raises(RuntimeError, match=f"{cuda.SOURCE}:\nline 1: no"),
    ):
        cuda_common.compiled(cuda.SOURCE, defines, (9, 0))


def test_launches_share_a_ticket_only_where_they_follow_each_other() -> None:
    tickets = cuda_common.Tickets(torch.device("cpu"))
    first, again, other, more = (tickets.take(h, s, False) for h, s in ((1, 7), (1, 7), (1, 8), (3, 7)))
    assert first == again and len({first, other, more}) == 3
    captured = [tickets.take(2, 7, True) for _ in range(3)]
    assert captured[1] - captured[0] == captured[2] - captured[1] == 8 and captured[0] > more
    with pytest.raises(RuntimeError, match="tickets"):
        tickets.take(cuda_common.SLOTS, 7, True)


def test_what_it_cannot_do_is_said() -> None:
    x, codebook = torch.randn(1, 10, 4), torch.randn(1, 3, 4)
    for arguments, message in (
        ((x.double(), codebook.double(), None, None, "l2", "default", "ste"), "float64"),
        ((x, codebook, None, None, "cosine", "default", "ste"), "'cosine'"),
        ((x, codebook, None, None, "l2", "default", "rotation"), "'rotation'"),
        ((x, torch.randn(1, 300, 4), None, None, "l2", "default", "ste"), "300"),
        ((torch.randn(1, 5, 900), torch.randn(1, 60, 900), None, None, "l2", "default", "ste"), "shared memory"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.vector_quantize(*arguments)
    for rows, codes, options, message in (
        (x, torch.randn(1, 300, 4), ("l2", "default"), "bfloat16"),
        (x.to(HALF), torch.randn(1, 300, 4).to(HALF), ("l2", "default"), "multiple of 8"),
        (torch.randn(1, 9, 8).to(HALF), torch.randn(1, 300, 8).to(HALF), ("l2", "exact"), "'default' or 'fast'"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest.nearest_code(rows, codes, *options, False)
    available, reason = lk.available_backends()["cuda"]
    if not torch.cuda.is_available():
        assert not available and "no CUDA device" in reason
        with pytest.raises(RuntimeError, match="'cuda' cannot run here"):
            lk.nearest_code(x[0], codebook[0], backend="cuda")


def test_why_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "7.5" in cuda_common.missing()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in cuda_common.missing()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with mock.patch.dict("sys.modules", {"cupy": None}):
        assert "pip install cupy-cuda" in cuda_common.missing()
    with mock.patch.dict("sys.modules", {"cupy": types.ModuleType("cupy")}):
        assert cuda_common.missing() == ""


def test_an_operator_without_a_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lk.backend, "resolve", lambda backend, device: backend)
    with pytest.raises(ValueError, match="'cuda' has no kernel for codebook_entropy"):
        lk.backend.load_kernel("codebook_entropy", "codebook_entropy", "cuda", torch.device("cuda"))
    assert lk.backend.load_kernel("vector_quantize", "vector_quantize", "cuda", torch.device("cuda")) is (
        cuda.vector_quantize
    )


def test_the_module_takes_the_one_launch_where_it_fits(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides it, with a GPU's answers where it asks for one."""
    vq, x = lk.VectorQuantize(8, 5, backend="cuda"), torch.randn(40, 8, requires_grad=True)
    monkeypatch.setattr(lk.one_call, "resolve", lambda backend, device: backend)
    averages = (vq.codebook, vq.cluster_size, vq.code_sums)
    kernels = lk.one_call.gpu_kernels
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        assert kernels(x, *averages, backend="cuda") is cuda
        assert kernels(x, *averages, backend="reference") is None
        assert kernels(x.double(), *averages, backend="triton") is None
        assert kernels(x.double(), *averages, backend="cuda") is None
        assert kernels(x[:, :7], *averages, backend="cuda") is None
        assert kernels(x, vq.codebook.double(), *averages[1:], backend="cuda") is None
        assert kernels(x, *(torch.randn(5, 8).t().contiguous().t(), *averages[1:]), backend="cuda") is None
    assert kernels(x, *averages, backend="cuda") is None
    twin = lk.VectorQuantize(8, 5, backend="reference")
    twin.load_state_dict(vq.state_dict())
    host.launches.clear()
    found, want = vq._step_on_gpu(x, cuda), twin(x)
    assert host.launches == ["vector_quantize_fwd"]
    for a, b in zip((*found, *vq.state_dict().values()), (*want, *twin.state_dict().values()), strict=True):
        torch.testing.assert_close(a, b)
