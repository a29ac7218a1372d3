"""The contract of the CUDA C++ kernels on a real GPU."""

from __future__ import annotations

import pytest
import torch
from contract import HARD_DATA, assert_contract, hard_data
from contract import scores as exact_scores
from torch import Tensor
from triton_cases import assert_quantized_like, more_hard_data, on_a_side_stream, replayed, thrown_out

import lamkernels as lk
from lamkernels.ops import cuda_common
from lamkernels.ops.vector_quantize import cuda, reference

AVAILABLE, REASON = lk.available_backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not AVAILABLE, reason=f"backend 'cuda' cannot run here: {REASON}")]

MORE = more_hard_data()
SHAPES = [(0, 3, 4), (1, 1, 1), (1000, 5, 3), (256, 8, 32), (1024, 64, 16), (2000, 60, 200), (70000, 16, 128)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def test_codes_thrown_far_out_cost_the_others_no_digits() -> None:
    x, codebook, expected = thrown_out()
    assert lk.nearest_code(x.cuda(), codebook.cuda(), backend="cuda").tolist() == expected.tolist()


def test_hard_data_keeps_the_contract() -> None:
    tried = 0
    for name in [*HARD_DATA, *MORE]:
        x, codebook = (t.cuda() for t in (MORE[name] if name in MORE else hard_data(name)))
        if not cuda.fits(*codebook.shape, x.device):
            continue
        tried += 1
        for precision in ("default", "exact"):
            indices = lk.nearest_code(x, codebook, precision=precision, backend="cuda")
            assert_contract(x.cpu(), codebook.cpu(), indices.cpu(), precision=precision)
            if name.startswith("integer"):
                assert torch.equal(indices, exact_scores(x, codebook).argmin(-1)), name
    assert tried >= 16


@pytest.mark.parametrize(("dtype", "code_dtype"), DTYPES)
def test_both_passes_agree_with_the_specification(dtype: torch.dtype, code_dtype: torch.dtype) -> None:
    for rows, codes, dim in SHAPES:
        codebook = torch.randn(1, codes, dim, device="cuda").to(code_dtype)
        # each row next to its code, so that rounding decides nothing
        x = (codebook[:, torch.arange(rows, device="cuda") % codes] * 1.01).to(dtype)
        x[:, rows // 2 : rows // 2 + 1] = torch.nan
        mask = (torch.arange(rows, device="cuda") % 5 != 3)[None]
        arguments = (x, codebook, mask, None, "l2", "default", "ste")
        got, want = torch.ops.lamkernels.vector_quantize(*arguments, "cuda"), reference.vector_quantize(*arguments)
        assert_quantized_like(got, want)
        again = torch.ops.lamkernels.vector_quantize(*arguments, "cuda")
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, again, strict=True))
        ones = torch.ones_like(got[2])
        arguments = (x, got[0], got[1], got[6], got[7], None, torch.randn_like(x), ones, 3 * ones, "l2", "ste")
        back = torch.ops.lamkernels.vector_quantize_backward(*arguments, "cuda")
        for a, b in zip(back, reference.vector_quantize_backward(*arguments), strict=True):
            torch.testing.assert_close(a, b)
        counts, sums = lk.code_statistics(x[0], got[1][0], codes, backend="cuda")
        assert torch.equal(counts, want[4][0])
        torch.testing.assert_close(sums, want[5][0], rtol=1e-5, atol=1e-4)


def trained(backend: str, steps: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    vq = lk.VectorQuantize(32, 8, dead_code_threshold=0.5, backend=backend, device="cuda")
    found: list[Tensor] = []
    for _ in range(steps):
        x = torch.randn(256, 32, device="cuda", dtype=dtype, requires_grad=True)
        quantized, indices, loss = vq(x)
        (quantized.float().square().mean() + loss).backward()
        assert x.grad is not None
        found = [quantized.detach(), indices, loss.detach(), x.grad]
    return (*found, *vq.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_steps_are_those_of_the_specification(dtype: torch.dtype) -> None:
    got, want = trained("cuda", 3, dtype), trained("reference", 3, dtype)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, trained("cuda", 3, dtype), strict=True))


def test_a_step_is_captured_and_waits_for_nothing() -> None:
    vq = lk.VectorQuantize(16, 64, backend="cuda", device="cuda")
    x = torch.randn(1024, 16, device="cuda", requires_grad=True)
    start = {name: t.clone() for name, t in vq.state_dict().items()}

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            for name, t in vq.state_dict().items():
                t.copy_(start[name])
        quantized, indices, loss = vq(x)
        (gradient,) = torch.autograd.grad(quantized.sum() + loss, x)
        return quantized, indices, loss, gradient, *(t.clone() for t in vq.state_dict().values())

    for a, b in zip(replayed(step, x), step(), strict=True):
        assert torch.equal(a, b)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not cuda_common._tickets(x.device).slots.any(), "a ticket is left behind"


def test_a_side_stream_is_honoured() -> None:
    x, codebook = torch.randn(100_000, 32, device="cuda"), torch.randn(16, 32, device="cuda")
    want = lk.vector_quantize(x, codebook, backend="cuda")
    got = on_a_side_stream(lambda late: lk.vector_quantize(late, codebook, backend="cuda"), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


on_hopper = pytest.mark.skipif(
    not AVAILABLE or torch.cuda.get_device_capability() != cuda_common.HOPPER, reason="needs an H100, H200 or GH200"
)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "codes", "dim"), [(5000, 300, 24), (70_001, 1024, 64), (20_000, 8192, 256), (1, 257, 8)]
)
def test_many_codes_keep_the_contract(dtype: torch.dtype, rows: int, codes: int, dim: int) -> None:
    x, codebook = (torch.randn(n, dim, device="cuda").to(dtype) for n in (rows, codes))
    codebook[7], codebook[9, 3] = codebook[200], torch.nan
    if rows > 400:
        x[5, 2], x[300], x[301] = torch.nan, torch.finfo(dtype).max, codebook[200]
    for metric in ("l2", "dot"):
        indices, distance = lk.nearest_code(x, codebook, metric=metric, return_distance=True, backend="cuda")
        assert_contract(x, codebook, indices, metric=metric)  # there, because a CPU would take minutes
        again = lk.nearest_code(x, codebook, metric=metric, backend="cuda")
        assert torch.equal(indices, again)
        taken = codebook.double()[indices.clamp(min=0)]
        best = (x.double() - taken).square().sum(-1) if metric == "l2" else (x.double() * taken).sum(-1)
        best = torch.where(indices >= 0, best, torch.nan).float()
        torch.testing.assert_close(distance, best, rtol=1e-5, atol=1e-5, equal_nan=True)
    grid = [torch.randint(-2, 3, (n, dim), device="cuda").to(dtype) for n in (min(rows, 3000), codes)]
    assert torch.equal(lk.nearest_code(*grid, backend="cuda"), exact_scores(*grid).argmin(-1))


@on_hopper
def test_a_lookup_of_many_codes_is_captured_and_honours_a_side_stream() -> None:
    x, codebook = torch.randn(9000, 64, device="cuda").bfloat16(), torch.randn(1000, 64, device="cuda").bfloat16()
    want = lk.nearest_code(x, codebook, backend="cuda")
    (got,) = replayed(lambda: (lk.nearest_code(x, codebook, backend="cuda"),), x)
    assert torch.equal(got, want)
    got = on_a_side_stream(lambda late: lk.nearest_code(late, codebook, backend="cuda"), x)
    assert torch.equal(got, want)


@on_hopper
@pytest.mark.parametrize(("rows", "dim", "lag"), [(100_000, 64, 0), (200_000, 512, 1), (60_000, 260, 0), (3, 8, 0)])
def test_covariances_keep_their_accuracy(rows: int, dim: int, lag: int) -> None:
    mixing = torch.randn(dim, dim, device="cuda")
    x = torch.randn(rows, dim, device="cuda") @ mixing + 10
    if rows > 5:
        x[5, 2] = torch.nan
    got, want = (lk.moments(x, lag=lag or None, backend=backend) for backend in ("cuda", "reference"))
    again = lk.moments(x, lag=lag or None, backend="cuda")
    bound = 1e-6 if rows >= 100 * dim else 2.0**-17
    for name, a in got._asdict().items():
        if a is not None:
            b = getattr(want, name)
            assert torch.equal(a, getattr(again, name)), f"two runs differ in {name}"
            size = (want.xx.norm() * want.yy.norm()).sqrt() if name == "xy" else b.norm()
            assert float((a - b).norm()) <= bound * float(size), name
