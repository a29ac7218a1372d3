"""The contract of the Triton kernels on a real GPU."""

from __future__ import annotations

import pytest
import torch
from contract import HARD_DATA, assert_contract, hard_data
from contract import scores as exact_scores
from layout_cases import CASES, LAYOUTS, assert_read_in_place
from torch import Tensor
from triton_cases import assert_quantized_like, more_hard_data, on_a_side_stream, replayed, thrown_out

import lamkernels as lk
from lamkernels.ops.vector_quantize import reference
from lamkernels.validation import Backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; there is none here"),
]

MORE = more_hard_data()
# rows, codes, dim: resident tiles with tails, streamed tiles with tails, one chunk and several
SHAPES = [(1, 1, 1), (1000, 5, 3), (5000, 16, 128), (777, 64, 64), (3000, 300, 40), (2049, 1025, 257)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
]
# every size in fp32, every dtype on either path: a compiler takes a second for each kernel
SOME = [*((shape, DTYPES[0]) for shape in SHAPES), *((SHAPES[i], pair) for i in (2, 4) for pair in DTYPES[1:])]


def data(rows: int, codes: int, dim: int, dtype: torch.dtype, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, dim, device="cuda").to(dtype), torch.randn(codes, dim, device="cuda").to(code_dtype)


def test_codes_thrown_far_out_cost_the_others_no_digits() -> None:
    x, codebook, expected = thrown_out()
    assert lk.nearest_code(x.cuda(), codebook.cuda(), backend="triton").tolist() == expected.tolist()


@pytest.mark.parametrize("precision", ["default", "exact"])
@pytest.mark.parametrize("name", [*HARD_DATA, *MORE])
def test_hard_data_keeps_the_contract(name: str, precision: str) -> None:
    x, codebook = MORE[name] if name in MORE else hard_data(name)
    indices = lk.nearest_code(x.cuda(), codebook.cuda(), precision=precision, backend="triton").cpu()
    assert_contract(x, codebook, indices, precision=precision)
    if name.startswith("integer"):
        assert torch.equal(indices, exact_scores(x, codebook).argmin(-1))


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize(("dtype", "code_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_and_tail(
    shape: tuple[int, int, int], dtype: torch.dtype, code_dtype: torch.dtype, metric: str
) -> None:
    x, codebook = data(*shape, dtype, code_dtype)
    indices, distance = lk.nearest_code(x, codebook, metric=metric, return_distance=True, backend="triton")
    assert_contract(x, codebook, indices, metric)
    chosen = exact_scores(x, codebook, metric).gather(1, indices[:, None]).squeeze(1)
    torch.testing.assert_close(distance.double(), chosen if metric == "l2" else -chosen, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "code_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_vector_quantize_agrees_with_the_specification(
    shape: tuple[int, int, int], dtype: torch.dtype, code_dtype: torch.dtype
) -> None:
    rows, codes, _ = shape
    # each row next to its code, so that rounding decides nothing
    _, codebook = data(*shape, dtype, code_dtype)
    x = (codebook[torch.arange(rows, device="cuda") % codes] * 1.01).to(dtype)
    mask = torch.arange(rows, device="cuda") % 5 != 3
    x[rows // 2] = torch.nan
    got = torch.ops.lamkernels.vector_quantize(
        x[None], codebook[None], mask[None], None, "l2", "default", "ste", "triton"
    )
    want = reference.vector_quantize(x[None], codebook[None], mask[None], None, "l2", "default", "ste")
    assert_quantized_like(got, want)
    grads = torch.randn_like(x)[None], torch.ones_like(got[2]), torch.ones_like(got[2])
    arguments = (x[None], got[0], got[1], got[6], got[7], None, *grads, "l2", "ste")
    for a, b in zip(
        torch.ops.lamkernels.vector_quantize_backward(*arguments, "triton"),
        reference.vector_quantize_backward(*arguments),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", ["ste", "rotation", "noise"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize(("shape", "dtypes"), SOME)
def test_every_gradient_under_every_metric(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], metric: str, gradient: str
) -> None:
    (rows, codes, _), (dtype, code_dtype) = shape, dtypes
    _, codebook = data(*shape, dtype, code_dtype)
    if metric == "cosine":
        codebook = torch.nn.functional.normalize(codebook.double(), dim=-1).to(code_dtype)
    else:  # of equal length, so that the nearest is also the one of the largest product
        codebook = (4 * torch.nn.functional.normalize(codebook.double(), dim=-1)).to(code_dtype)
    x = (codebook[torch.arange(rows, device="cuda") % codes] * 1.01).to(dtype)
    x = torch.where(torch.rand_like(x) < 0.1, x * 1.1, x)[None]
    noise = torch.randn_like(x) if gradient == "noise" else None
    arguments = (x, codebook[None], None, noise, metric, "default", gradient)
    got, want = torch.ops.lamkernels.vector_quantize(*arguments, "triton"), reference.vector_quantize(*arguments)
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 1e-5)
    torch.testing.assert_close(got[0], want[0], rtol=rounding, atol=rounding)
    assert_quantized_like((want[0], *got[1:]), want)
    grad, ones = torch.randn_like(x), torch.ones_like(want[2])
    chosen = want[0] if noise is None else want[8]
    arguments = (x, chosen, want[1], want[6], want[7], noise, grad, 3 * ones, ones, metric, gradient)
    got = torch.ops.lamkernels.vector_quantize_backward(*arguments, "triton")
    for a, b in zip(got, reference.vector_quantize_backward(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=10 * rounding, atol=10 * rounding)


def test_a_codebook_is_normalised_as_by_torch_and_nothing_waits_for_it() -> None:
    x, codebook = (t.requires_grad_() for t in data(1000, 64, 24, torch.float32, torch.float32))
    with torch.no_grad():
        codebook[3] = 0
        codebook[5, 7] = torch.nan

    def step(backend: Backend) -> tuple[Tensor, ...]:
        out = lk.vector_quantize(x, codebook, metric="cosine", backend=backend)
        return out.quantized, *torch.autograd.grad(out.quantized.square().sum() + out.codebook_loss, (x, codebook))

    step("triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, theirs in zip(got, step("reference"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not got[2][5].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_two_runs_agree_to_the_last_bit(shape: tuple[int, int, int]) -> None:
    x, codebook = data(*shape, torch.float32, torch.float32)
    first, second = (lk.vector_quantize(x, codebook, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first, second = (lk.code_statistics(x, torch.zeros_like(first[1]), shape[1], backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(1024, 64, 16), (2048, 1024, 64)])
def test_a_training_step_is_captured_in_a_cuda_graph(shape: tuple[int, int, int]) -> None:
    x, codebook = data(*shape, torch.float32, torch.float32)
    x.requires_grad_(), codebook.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = lk.vector_quantize(x, codebook, backend="triton")
        loss = out.quantized.sum() + out.commitment_loss + out.codebook_loss
        return (*out, *torch.autograd.grad(loss, (x, codebook)))

    for a, b in zip(replayed(step, x), step(), strict=True):
        assert torch.equal(a, b)


def test_a_side_stream_is_honoured() -> None:
    x, codebook = data(100_000, 16, 32, torch.float32, torch.float32)
    want = lk.vector_quantize(x, codebook, backend="triton")
    got = on_a_side_stream(lambda late: lk.vector_quantize(late, codebook, backend="triton"), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("codes", "dim"), [(4, 16), (300, 128)])
def test_more_than_two_to_the_31_entries(codes: int, dim: int) -> None:
    rows = 2**31 // dim + 1000
    if torch.cuda.mem_get_info()[0] < 8 * rows * dim:
        pytest.skip("needs about 16 GiB of free GPU memory")
    codebook = torch.randn(codes, dim, device="cuda", dtype=torch.float16)
    want = torch.arange(rows, device="cuda") % codes
    out = lk.vector_quantize(codebook[want], codebook, backend="triton")
    assert torch.equal(out.indices, want)
    assert torch.equal(out.quantized[-1000:], codebook[want[-1000:]])
    assert out.commitment_loss.item() == 0.0
    assert torch.equal(out.counts, torch.bincount(want, minlength=codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("metric", "gradient"), CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_read_where_they_lie(name: str, metric: str, gradient: str, dtype: torch.dtype) -> None:
    assert_read_in_place(name, metric, gradient, "triton", dtype, "cuda")
