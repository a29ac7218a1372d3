from __future__ import annotations

import pytest
import torch
from contract import DTYPES, HARD_DATA, assert_contract, hard_data, scores
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import lamkernels as lk

SHAPES = [(1, 1, 1), (1, 5, 3), (23, 1, 4), (24, 4, 8), (25, 5, 7), (100, 13, 33), (257, 64, 16), (90, 300, 130)]


@pytest.mark.parametrize("precision", ["default", "exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_gets_its_nearest_code(backend, shape, dtype, precision):
    rows, codes, dim = shape
    x, codebook = torch.randn(rows, dim).to(dtype), torch.randn(codes, dim).to(dtype)
    for metric in ("l2", "dot"):
        indices, distance = lk.nearest_code(
            x, codebook, metric=metric, precision=precision, return_distance=True, backend=backend
        )
        assert indices.dtype == torch.int64 and indices.shape == (rows,)
        assert_contract(x, codebook, indices, metric, "exact" if precision == "exact" and metric == "l2" else "default")
        chosen = scores(x, codebook, metric).gather(1, indices[:, None])[:, 0]
        assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(distance.double(), chosen if metric == "l2" else -chosen, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("precision", ["default", "exact"])
@pytest.mark.parametrize("name", HARD_DATA)
def test_hard_data(backend, name, precision):
    x, codebook = hard_data(name)
    indices = lk.nearest_code(x, codebook, precision=precision, backend=backend)
    assert_contract(x, codebook, indices, precision=precision)


@pytest.mark.parametrize("name", ["integer grid", "integer grid with an offset", "duplicate codes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_ties_go_to_the_lowest_index(backend, name, dtype):
    x, codebook = hard_data(name)
    if dtype in (torch.bfloat16, torch.float16) and name == "duplicate codes":
        codebook = codebook.to(dtype).float()
    if name == "integer grid with an offset" and dtype == torch.bfloat16:
        x, codebook = x - 900, codebook - 900  # bf16 holds integers up to 256
    x, codebook = x.to(dtype), codebook.to(dtype)
    indices = lk.nearest_code(x, codebook, backend=backend)
    values = scores(x, codebook)
    lowest = (values == values.amin(1, keepdim=True)).int().argmax(1)
    if name != "duplicate codes":
        assert torch.equal(indices, lowest)
    first = (codebook[:, None] == codebook).all(-1).int().argmax(1)  # of equal codes, the first one
    assert torch.equal(indices, first[indices])


def test_fp16_rows_whose_squared_norm_exceeds_the_largest_half(backend):
    x = (300 + torch.randn(200, 64)).half()
    codebook = (300 + torch.randn(20, 64)).half()
    assert_contract(x, codebook, lk.nearest_code(x, codebook, backend=backend))


def test_no_finite_code_means_no_code(backend):
    x, codebook = torch.randn(5, 3), torch.full((4, 3), torch.nan)
    indices, distance = lk.nearest_code(x, codebook, return_distance=True, backend=backend)
    assert (indices == -1).all() and distance.isnan().all()


def test_cosine_is_the_largest_product_of_normalised_vectors(backend):
    x, codebook = torch.randn(3, 50, 9), torch.randn(12, 9)
    x[0, 0] = 0
    indices, similarity = lk.nearest_code(x, codebook, metric="cosine", return_distance=True, backend=backend)
    products = F.normalize(x.double(), dim=-1) @ F.normalize(codebook.double(), dim=-1).T
    torch.testing.assert_close(similarity.double(), products.amax(-1), atol=1e-6, rtol=0)
    assert indices[0, 0] == 0  # a zero vector scores 0 everywhere
    flat = products.reshape(-1, 12).gather(1, indices.reshape(-1, 1))[:, 0]
    assert (products.reshape(-1, 12).amax(1) - flat <= 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scales", [(1e-30, 1e-14), (1e-38, 1e-7), (1e-38, 1e-10), (1e30, 1e-30), (1e-20, 1e30)])
def test_dot_products_of_any_size(backend, scales, dtype):
    x, codebook = ((scale * torch.randn(200, 7)).to(dtype) for scale in scales)
    x[3] = 0
    indices = lk.nearest_code(x, codebook, metric="dot", backend=backend)
    assert_contract(x, codebook, indices, "dot")
    assert indices[3] == 0


def test_half_rows_with_an_fp32_codebook(backend):
    for dtype in (torch.bfloat16, torch.float16):
        x, codebook = torch.randn(300, 24).to(dtype), torch.randn(40, 24)
        assert_contract(x, codebook, lk.nearest_code(x, codebook, backend=backend))


def test_a_codebook_per_head(backend):
    x, codebook = torch.randn(3, 4, 50, 8), torch.randn(3, 20, 8)
    indices = lk.nearest_code(x, codebook, backend=backend)
    assert indices.shape == (3, 4, 50)
    for head in range(3):
        assert_contract(x[head].reshape(-1, 8), codebook[head], indices[head].reshape(-1))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.flip(0).mT.contiguous().mT.flip(0),
        lambda x: x[:, ::2],
        lambda x: x[:, :, ::2],
        lambda x: x[:, :1].expand(-1, 40, -1),
        lambda x: x[..., 1:9],
        lambda x: x[:0],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend, layout, dtype):
    x = layout(torch.randn(6, 10, 16).to(dtype))
    codebook = torch.randn(11, 2 * x.shape[-1]).to(dtype)[:, ::2]
    indices = lk.nearest_code(x, codebook, backend=backend)
    assert torch.equal(indices, lk.nearest_code(x.contiguous(), codebook.contiguous(), backend=backend))
    assert_contract(x.reshape(-1, x.shape[-1]), codebook, indices.reshape(-1))


def test_offsets_past_2_to_the_31():
    # rows 2³¹ elements apart, in memory that is reserved but, except for these rows, never touched
    apart = 2**31 + 8
    torch.use_deterministic_algorithms(False)  # which would fill it
    x = torch.empty(apart * 2 + 8, dtype=torch.float16).as_strided((3, 8), (apart, 1))
    x.copy_(torch.randn(3, 8))
    codebook = torch.randn(16, 8).half()
    indices = lk.nearest_code(x, codebook, backend="numba")
    assert torch.equal(indices, lk.nearest_code(x.contiguous(), codebook, backend="reference"))


@pytest.mark.parametrize("shape", [(20000, 100, 32), (9000, 5000, 8)], ids=str)  # sums by chunk, and by code
def test_two_runs_and_any_number_of_threads_give_the_same_bits(shape):
    rows, codes, dim = shape
    x, codebook = torch.randn(rows, dim), torch.randn(codes, dim)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(lk.vector_quantize(x, codebook, backend="numba"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 200),
    codes=st.integers(1, 70),
    dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e20]),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    special=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_contract_holds_on_any_data(rows, codes, dim, dtype, scale, offset, special, seed):
    torch.manual_seed(seed)
    if dtype == torch.float16:
        scale = min(max(scale, 1e-3), 10.0)
    x = (scale * (offset + torch.randn(rows, dim))).to(dtype)
    codebook = (scale * (offset + torch.randn(codes, dim))).to(dtype)
    if special and rows > 2:
        x[rows // 2, dim // 2] = torch.nan
        x[rows // 3, dim // 3] = torch.inf
    for backend in ("reference", "numba"):
        for precision in ("default", "exact"):
            indices = lk.nearest_code(x, codebook, precision=precision, backend=backend)
            assert_contract(x, codebook, indices, precision=precision)
