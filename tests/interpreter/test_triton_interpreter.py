"""The contract of the Triton kernels in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import HARD_DATA, assert_contract, hard_data
from contract import scores as exact_scores
from layout_cases import CASES, LAYOUTS, assert_read_in_place
from step_cases import assert_learned_anyhow, assert_learned_steps, assert_steps_of_the_module
from torch import Tensor
from triton_cases import assert_quantized_like, more_hard_data, thrown_out

pytest.importorskip("triton", reason="Triton is not installed")

import lamkernels as lk
from lamkernels import tuning
from lamkernels.ops.code_statistics import reference as reference_statistics
from lamkernels.ops.code_statistics import triton as statistics
from lamkernels.ops.nearest_code import triton as nearest
from lamkernels.ops.vector_quantize import reference as reference_quantize
from lamkernels.ops.vector_quantize import triton as quantize
from lamkernels.ops.vector_quantize import triton_step

MORE = more_hard_data()
ROWS = 70  # of the hard data: the interpreter is slow
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
]
SHAPES = [(1, 1, 1, 1), (1, 65, 3, 2), (2, 33, 17, 5), (1, 40, 70, 20)]


@pytest.fixture(params=["resident", "streamed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small codebooks take the resident path; "streamed" sends them through the kernels of large ones."""
    if request.param == "streamed":
        monkeypatch.setattr(tuning, "resident", lambda *args: None)
    return str(request.param)


def data(
    heads: int, rows: int, codes: int, dim: int, dtype: torch.dtype, code_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads + rows + codes + dim)
    x = torch.randn(heads, rows, dim, generator=generator)
    codebook = torch.randn(heads, codes, dim, generator=generator)
    return x.to(dtype), codebook.to(code_dtype)


def hard(name: str) -> tuple[Tensor, Tensor]:
    x, codebook = MORE[name] if name in MORE else hard_data(name)
    return x[:ROWS], codebook


def test_codes_thrown_far_out_cost_the_others_no_digits() -> None:
    x, codebook, expected = thrown_out()
    indices, _ = nearest.nearest_code(x[None], codebook[None], "l2", "default", False)
    assert indices[0].tolist() == expected.tolist()


@pytest.mark.parametrize("name", [*HARD_DATA, *MORE])
def test_hard_data_keeps_the_contract(name: str, path: str) -> None:
    x, codebook = hard(name)
    indices, _ = nearest.nearest_code(x[None], codebook[None], "l2", "default", False)
    assert_contract(x, codebook, indices[0])
    if name.startswith("integer"):
        assert torch.equal(indices[0], exact_scores(x, codebook).argmin(-1))


@pytest.mark.parametrize("name", ["one code at 1e7", "entries near 1e30", "NaN and infinity", "duplicate codes", *MORE])
def test_exact_returns_the_fp64_minimum(name: str) -> None:
    x, codebook = hard(name)
    indices, distance = nearest.nearest_code(x[None], codebook[None], "l2", "exact", True)
    assert_contract(x, codebook, indices[0], precision="exact")
    want = exact_scores(x, codebook).min(-1).values.masked_fill(~x.isfinite().all(-1), torch.nan).float()
    torch.testing.assert_close(distance[0], want, equal_nan=True)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize(("dtype", "code_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_and_tail(
    shape: tuple[int, int, int, int], dtype: torch.dtype, code_dtype: torch.dtype, metric: str, path: str
) -> None:
    x, codebook = data(*shape, dtype, code_dtype)
    indices, distance = nearest.nearest_code(x, codebook, metric, "default", True)
    for head in range(shape[0]):
        scores = exact_scores(x[head], codebook[head], metric)
        chosen = scores.gather(1, indices[head][:, None]).squeeze(1)
        if metric == "l2":
            assert_contract(x[head], codebook[head], indices[head])
        else:
            scale = x[head].double().norm(dim=-1) * codebook[head].double().norm(dim=-1).max()
            assert bool((chosen - scores.min(-1).values <= 8 * (2.0**-21 + shape[3] * 2.0**-24) * scale).all())
        torch.testing.assert_close(distance[head].double(), chosen if metric == "l2" else -chosen, rtol=1e-5, atol=1e-5)


def test_only_codes_that_are_not_finite(path: str) -> None:
    x, codebook = torch.randn(1, 5, 3), torch.full((1, 4, 3), torch.nan)
    indices, distance = nearest.nearest_code(x, codebook, "l2", "default", True)
    assert bool((indices == -1).all()) and bool(distance.isnan().all())


def test_no_rows(path: str) -> None:
    x, codebook = torch.empty(2, 0, 3), torch.randn(2, 4, 3)
    assert nearest.nearest_code(x, codebook, "l2", "default", True)[0].shape == (2, 0)
    outputs = quantize.vector_quantize(x, codebook, None, None, "l2", "default", "ste")
    assert outputs[0].shape == (2, 0, 3)
    assert all(bool((output == 0).all()) for output in outputs[2:])


@pytest.mark.parametrize("layout", ["row stride", "expanded", "inner stride", "head stride"])
def test_strides(layout: str, path: str) -> None:
    base = torch.randn(40, 3, 14)
    x = {
        "row stride": base[:, 1:2, 2:9].transpose(0, 1),  # (1, 40, 7), rows 42 apart
        "expanded": base[:1, :1, :7].expand(1, 40, 7),
        "inner stride": base[:, :1, ::2].transpose(0, 1),
        "head stride": base[:, :, :7].transpose(0, 1),  # (3, 40, 7)
    }[layout]
    codebook = torch.randn(1, 5, 7).expand(x.shape[0], 5, 7)
    got = quantize.vector_quantize(x, codebook, None, None, "l2", "default", "ste")
    want = quantize.vector_quantize(x.contiguous(), codebook.contiguous(), None, None, "l2", "default", "ste")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    got_statistics = statistics.code_statistics(x, got[1], 5)
    for a, b in zip(got_statistics, statistics.code_statistics(x.contiguous(), got[1], 5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "code_dtype"), DTYPES)
def test_vector_quantize_agrees_with_the_specification(
    dtype: torch.dtype, code_dtype: torch.dtype, masked: bool, path: str
) -> None:
    x, codebook = data(2, 75, 6, 5, dtype, code_dtype)
    codebook = codebook.to(dtype).to(code_dtype)  # the interpreter truncates to bf16 where a GPU rounds
    x[0, 3, 0], x[1, 74], codebook[1, 2, 4] = torch.nan, torch.inf, torch.nan
    mask = torch.arange(150).reshape(2, 75) % 4 != 1 if masked else None
    got = quantize.vector_quantize(x, codebook, mask, None, "l2", "default", "ste")
    assert_quantized_like(got, reference_quantize.vector_quantize(x, codebook, mask, None, "l2", "default", "ste"))


def test_vector_quantize_of_a_far_row_and_offset_codes(path: str) -> None:
    x, codebook = torch.randn(1, 50, 4) + 100, torch.randn(1, 3, 4) + 100
    x[0, 7] = 1e9
    got = quantize.vector_quantize(x, codebook, None, None, "l2", "default", "ste")
    assert_quantized_like(got, reference_quantize.vector_quantize(x, codebook, None, None, "l2", "default", "ste"))


def test_exact_and_dot_quantize(path: str) -> None:
    x, codebook = data(1, 20, 4, 3, torch.float32, torch.float32)
    for metric, precision in (("l2", "exact"), ("dot", "default")):
        got = quantize.vector_quantize(x, codebook, None, None, metric, precision, "ste")
        assert_quantized_like(
            got, reference_quantize.vector_quantize(x, codebook, None, None, metric, precision, "ste")
        )


@pytest.mark.parametrize("gradient", ["none", "contiguous", "expanded", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_backward(dtype: torch.dtype, gradient: str) -> None:
    x, codebook = data(2, 41, 5, 6, dtype, dtype)
    x[1, 4, 2] = torch.nan
    outputs = reference_quantize.vector_quantize(x, codebook, None, None, "l2", "default", "ste")
    grad = {
        "none": None,
        "contiguous": torch.randn(2, 41, 6).to(dtype),
        "expanded": torch.ones((), dtype=dtype).expand(2, 41, 6),
        "transposed": torch.randn(6, 41, 2).to(dtype).permute(2, 1, 0),
    }[gradient]
    loss_grads = torch.tensor([3.0, 0.5], dtype=outputs[2].dtype), torch.ones((), dtype=outputs[2].dtype).expand(2)
    arguments = (x, outputs[0], outputs[1], outputs[6], outputs[7], None, grad, *loss_grads, "l2", "ste")
    got = quantize.vector_quantize_backward(*arguments)
    want = reference_quantize.vector_quantize_backward(*arguments)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


EVERY_GRADIENT = [
    *itertools.product(
        (torch.float32, torch.float16, torch.bfloat16, torch.float64),
        ("l2", "cosine", "dot"),
        ("ste", "rotation", "noise"),
        (6,),
    ),
    # rows in several blocks take the interpreter ten seconds
    (torch.float32, "l2", "noise", 300),
    (torch.float16, "dot", "ste", 300),
    (torch.float32, "cosine", "rotation", 300),
]


@pytest.mark.parametrize(("dtype", "metric", "gradient", "dim"), EVERY_GRADIENT)
def test_every_gradient_under_every_metric(dtype: torch.dtype, metric: str, gradient: str, dim: int) -> None:
    code_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, codebook = data(2, 41, 5, dim, dtype, code_dtype)
    if metric == "cosine":
        codebook = torch.nn.functional.normalize(codebook, dim=-1)
    codebook = codebook.to(dtype).to(code_dtype)  # the interpreter truncates to bf16 where a GPU rounds
    x[1, 4, 2], x[0, 3] = torch.nan, 0.0
    noise = torch.randn(x.shape).to(dtype) if gradient == "noise" else None
    mask = torch.arange(82).reshape(2, 41) % 7 != 2
    arguments = (x, codebook, mask, noise, metric, "default", gradient)
    got, want = quantize.vector_quantize(*arguments), reference_quantize.vector_quantize(*arguments)
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 1e-6)  # bf16 is truncated here
    torch.testing.assert_close(got[0], want[0], rtol=rounding, atol=rounding, equal_nan=True)
    assert_quantized_like((want[0], *got[1:]), want)
    grad, ones = torch.randn(x.shape).to(dtype), torch.ones(2, dtype=want[2].dtype)
    codes = want[0] if noise is None else want[8]
    arguments = (x, codes, want[1], want[6], want[7], noise, grad, 3 * ones, ones, metric, gradient)
    got, want = (module.vector_quantize_backward(*arguments) for module in (quantize, reference_quantize))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=max(rounding, 1e-5), atol=max(rounding, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_code_statistics(dtype: torch.dtype, path: str) -> None:
    x, _ = data(2, 90, 7, 5, dtype, dtype)
    x[0, 11, 4] = torch.inf
    indices = (torch.arange(180).reshape(2, 90) * 7) % 10 - 2  # −2 … 7: some outside [0, 7)
    counts, sums = statistics.code_statistics(x, indices, 7)
    want_counts, want_sums = reference_statistics.code_statistics(x, indices, 7)
    assert torch.equal(counts, want_counts)
    torch.testing.assert_close(sums, want_sums)


def test_a_collapsed_codebook_and_one_entry_past_fp32_do_not_spill_over(path: str) -> None:
    x = torch.ones(1, 130, 2)
    x[0, 5] = 3.39e38
    x[0, 6] = 3.39e38
    indices = torch.ones(1, 130, dtype=torch.int64)
    indices[0, 5:7] = 3
    counts, sums = statistics.code_statistics(x, indices, 5)
    assert counts.tolist() == [[0, 128, 0, 2, 0]]
    assert sums[0, :, 0].tolist() == [0.0, 128.0, 0.0, torch.inf, 0.0]


def test_a_step_with_its_averages_is_that_of_the_module(path: str) -> None:
    torch.manual_seed(0)
    for rows, codes, dim, dtype in ((40, 8, 32, torch.float32), (20, 130, 3, torch.bfloat16), (0, 3, 4, torch.float32)):
        assert_steps_of_the_module(triton_step, rows, codes, dim, dtype, 1e-6)
    assert_steps_of_the_module(triton_step, 10, 3, 140, torch.float32, 1e-6)  # several programs for the sums of a code


def test_a_learned_codebook_takes_rows_and_gradients_of_every_kind():
    assert_learned_anyhow(triton_step, "cpu")


@pytest.mark.parametrize(("codes", "dim"), [(3, 5), (70, 20), (300, 70)], ids=str)  # in one tile, and streamed
def test_a_learned_codebook_steps_as_in_the_module(codes, dim):
    for dtype, metric in ((torch.float32, "l2"), (torch.bfloat16, "dot")):
        assert_learned_steps(triton_step, 40, codes, dim, dtype, metric)


def test_two_runs_agree_to_the_last_bit(path: str) -> None:
    x, codebook = data(1, 150, 9, 6, torch.float32, torch.float32)
    first, second = (quantize.vector_quantize(x, codebook, None, None, "l2", "default", "ste") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_public_functions_reach_the_kernels() -> None:
    x, codebook = torch.randn(30, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = lk.vector_quantize(x, codebook, backend="triton")
    (out.quantized.sum() + out.commitment_loss + out.codebook_loss).backward()
    got = x.grad, codebook.grad
    x.grad = codebook.grad = None
    want = lk.vector_quantize(x, codebook, backend="reference")
    (want.quantized.sum() + want.commitment_loss + want.codebook_loss).backward()
    assert torch.equal(out.indices, want.indices)
    torch.testing.assert_close(got, (x.grad, codebook.grad))
    for scale in (1e-30, 1.0, 1e30):
        got = lk.nearest_code(scale * x, codebook, metric="cosine", return_distance=True, backend="triton")
        want = lk.nearest_code(scale * x, codebook, metric="cosine", return_distance=True, backend="reference")
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scales", [(1e-30, 1e-14), (1e-38, 1e-7), (1e30, 1e-30)])
def test_dot_products_of_any_size(scales: tuple[float, float], path: str) -> None:
    x, codebook = (scale * torch.randn(1, 70, 7) for scale in scales)
    x[0, 3] = 0
    indices, _ = nearest.nearest_code(x, codebook, "dot", "default", False)
    assert_contract(x[0], codebook[0], indices[0], "dot")


def test_a_loss_past_the_squares_of_fp32(path: str) -> None:
    x, codebook = torch.zeros(1, 60, 4), torch.zeros(1, 2, 4)
    x[0, 7, 2] = 2e19
    got = quantize.vector_quantize(x, codebook, None, None, "l2", "default", "ste")
    torch.testing.assert_close(got[2], torch.tensor([4e38 / 240]))


@pytest.mark.parametrize(("metric", "gradient"), CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_read_where_they_lie(name: str, metric: str, gradient: str, path: str) -> None:
    assert_read_in_place(name, metric, gradient, "triton", torch.float32, "cpu")
