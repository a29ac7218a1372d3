"""The CUDA C++ kernels without a GPU: their machine code, and what their source computes on a CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
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
from torch import Tensor
from triton_cases import assert_quantized_like, more_hard_data

import lamkernels as lk
from lamkernels.ops import cuda_common
from lamkernels.ops.code_statistics import cuda as statistics
from lamkernels.ops.code_statistics import reference as statistics_reference
from lamkernels.ops.nearest_code import cuda as nearest
from lamkernels.ops.vector_quantize import cuda, reference

__all__ = ["host"]

SOURCES = Path(__file__).parents[1] / "csrc"
TARGETS = ("sm_80", "sm_90a", "sm_100")
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
PAIRS = ((SINGLE, SINGLE), (BRAIN, SINGLE), (HALF, HALF), (BRAIN, BRAIN), (HALF, SINGLE))  # of rows and codes
COMPILED = [
    pytest.param(target, pair, marks=() if i == j else pytest.mark.exhaustive)
    for i, target in enumerate(TARGETS)
    for j, pair in enumerate(PAIRS)
]
MORE = more_hard_data()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, of the CUDA toolkit, is not installed")
@pytest.mark.parametrize(("target", "pair"), COMPILED)
def test_every_kernel_compiles_without_spills_or_local_memory(
    target: str, pair: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    defines = [f"-D{side}_TYPE={cuda_common.TYPES[dtype]}" for side, dtype in zip("XC", pair, strict=True)]
    for source in SOURCES.glob("*.cu"):
        assert not re.search(r"#include|__builtin_", source.read_text()), "NVRTC, which compiles it, has neither"
        command = ["nvcc", "-std=c++17", "--fmad=false", "-cubin", f"-arch={target}", "-Xptxas=-v", *defines]
        done = subprocess.run(
            [*command, source, "-o", tmp_path / "out.cubin"], capture_output=True, text=True, check=True
        )
        kernels = re.findall(r'extern "C" __global__', source.read_text())
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert len(used) == len(kernels) > 0, done.stderr
        assert all(set(numbers) == {"0"} for numbers in used), done.stderr


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
    assert tried >= 17


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
        vq = lk.VectorQuantize(dim, codes, decay=0.7, eps=1e-3, commitment_weight=0.3, backend="reference")
        ours = tuple(t.clone() for t in (vq.codebook, vq.cluster_size, vq.code_sums))
        for step in range(3):
            x = torch.randn(2, rows // 2, dim).to(dtype)
            if rows and step == 1:
                x[0, 3] = torch.nan
            left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
            versions = [t._version for t in ours]
            quantized, indices, loss = cuda.ema_step(left, ours, "default", (0.7, 1e-3), 0.3)
            assert all(t._version > version for t, version in zip(ours, versions, strict=True))
            want = vq(right)
            torch.testing.assert_close(quantized, want[0], equal_nan=True)
            assert torch.equal(indices, want[1])
            torch.testing.assert_close(loss, want[2])
            for a, b in zip(ours, (vq.codebook, vq.cluster_size, vq.code_sums), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
            weight = torch.randn_like(x)
            ((quantized * weight).nan_to_num().sum() + 2 * loss).backward()
            ((want[0] * weight).nan_to_num().sum() + 2 * want[2]).backward()
            assert left.grad is not None and right.grad is not None
            torch.testing.assert_close(left.grad, right.grad)
            for a, b in zip(ours, (vq.codebook, vq.cluster_size, vq.code_sums), strict=True):
                a.copy_(b)  # else a row between two codes could fall on either side


def test_a_step_is_two_launches(host: Host) -> None:
    codebook, x = torch.randn(5, 4), torch.randn(40, 4, requires_grad=True)
    host.launches.clear()
    quantized, _, loss = cuda.ema_step(x, (codebook, torch.ones(5), codebook.clone()), "default", (0.8, 1e-5), 1.0)
    (quantized.sum() + loss).backward()
    assert host.launches == ["vector_quantize_fwd", "vector_quantize_bwd"]


class FakeCuPy(types.ModuleType):
    """As much of CuPy as a launch uses, over the kernels on the CPU; ``raw`` are the modules that were compiled."""

    def __init__(self, host: Host) -> None:
        super().__init__("cupy")
        self.host, self.raw, self.entered = host, [], 0
        stream = type("Stream", (), {"from_external": staticmethod(self._stream)})
        self.cuda = types.SimpleNamespace(Stream=stream)

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> Any:
        self.raw.append((code, options))
        dtypes = tuple(
            next(t for t, name in cuda_common.TYPES.items() if f"-D{side}_TYPE={name}" in options) for side in "XC"
        )

        def function(name: str) -> Any:
            kernel = mock.Mock()

            def call(grid: tuple[int], block: tuple[int], arguments: tuple[Any], *, shared_mem: int) -> None:
                assert self.entered == 1 and block == (cuda_common.THREADS,) and arguments[0].size == 1
                assert shared_mem <= 48 * 1024 or shared_mem <= kernel.max_dynamic_shared_size_bytes
                self.host.launch(
                    name, "vector_quantize.cu", dtypes, *grid, arguments[0].tobytes(), shared_mem, torch.device("cpu")
                )

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


@pytest.fixture
def fake_gpu(host: Host) -> Iterator[FakeCuPy]:
    """A GPU whose kernels run on CPU tensors, behind everything that a launch calls."""
    cupy, stream = FakeCuPy(host), mock.Mock(cuda_stream=7, device_index=0)
    cached = (cuda_common._function, cuda_common._stream, cuda_common._tickets)
    with (
        mock.patch.dict("sys.modules", {"cupy": cupy}),
        mock.patch.object(cuda, "launch", cuda_common.launch),
        mock.patch.object(cuda, "tickets", cuda_common.tickets),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: stream),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch.cuda, "device"),
    ):
        yield cupy
    for function in cached:
        function.cache_clear()


def test_a_launch_goes_through_cupy(fake_gpu: FakeCuPy) -> None:
    x, codebook = rows_and_codes(70, 64, 240, (SINGLE, SINGLE))
    want = reference.vector_quantize(x, codebook, None, None, "l2", "default", "ste")
    for _ in range(2):
        assert_quantized_like(cuda.vector_quantize(x, codebook, None, None, "l2", "default", "ste"), want)
    ((code, options),) = fake_gpu.raw  # compiled once
    assert code == (SOURCES / cuda.SOURCE).read_text() and "--fmad=false" in options


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
    with pytest.raises(ValueError, match="'cuda' has no kernel for covariance"):
        lk.backend.load_kernel("covariance", "covariance", "cuda", torch.device("cuda"))
    assert lk.backend.load_kernel("vector_quantize", "vector_quantize", "cuda", torch.device("cuda")) is (
        cuda.vector_quantize
    )


def test_the_module_takes_the_one_launch_where_it_fits(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides it, with a GPU's answers where it asks for one."""
    vq, x = lk.VectorQuantize(8, 5, backend="cuda"), torch.randn(40, 8, requires_grad=True)
    monkeypatch.setattr(lk.one_call, "resolve", lambda backend, device: backend)
    monkeypatch.setattr(lk.one_call, "is_plain", lambda *tensors, device="cpu": device == "cuda")
    averages = (vq.codebook, vq.cluster_size, vq.code_sums)
    fits = lk.one_call.fits_one_launch
    assert fits(x, *averages, backend="cuda")
    assert not fits(x, *averages, backend="auto")
    assert not fits(x.double(), *averages, backend="cuda")
    assert not fits(x[:, :7], *averages, backend="cuda")
    assert not fits(x, vq.codebook.double(), *averages[1:], backend="cuda")
    assert not fits(x, *(torch.randn(5, 8).t().contiguous().t(), *averages[1:]), backend="cuda")
    twin = lk.VectorQuantize(8, 5, backend="reference")
    twin.load_state_dict(vq.state_dict())
    host.launches.clear()
    found, want = vq._step_in_one_launch(x), twin(x)
    assert host.launches == ["vector_quantize_fwd"]
    for a, b in zip((*found, *vq.state_dict().values()), (*want, *twin.state_dict().values()), strict=True):
        torch.testing.assert_close(a, b)
