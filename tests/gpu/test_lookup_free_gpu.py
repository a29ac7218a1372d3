"""The quantisers without a learned codebook on a real GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import replayed

import lamkernels as lk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; there is none here"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def rows(count: int, dim: int, dtype: torch.dtype) -> Tensor:
    x = 1.5 * torch.randn(count, dim, device="cuda").to(dtype)
    if count > 9:
        x[3, 0], x[7, dim - 1], x[9, 0] = torch.nan, torch.inf, -torch.inf
    return x.requires_grad_()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [2], [1000, 2, 7], [2] * 62], ids=lambda v: f"{len(v)} columns")
@pytest.mark.parametrize("count", [1, 100_003])
def test_finite_scalar_agrees_with_the_specification(
    levels: list[int], count: int, dtype: torch.dtype, symmetric: bool
) -> None:
    x = rows(count, len(levels), dtype)
    results = []
    for backend in ("triton", "reference"):
        quantized, indices = lk.finite_scalar_quantize(x, levels, symmetric=symmetric, backend=backend)
        results.append((quantized, indices, torch.autograd.grad(quantized.sum(), x)[0]))
    got, want = results
    torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[2], want[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 10, 16])
@pytest.mark.parametrize("count", [1, 20_003])
def test_lookup_free_agrees_with_the_specification(count: int, dim: int, dtype: torch.dtype) -> None:
    x = rows(count, dim, dtype)
    mask = torch.arange(count, device="cuda") % 5 != 3
    grad = torch.randn(count, dim, device="cuda").to(dtype)
    results = []
    for backend in ("triton", "reference"):
        out = lk.lookup_free_quantize(x, scale=0.3, inv_temperature=4.0, mask=mask, backend=backend)
        total = 3 * out.commitment_loss + count * (out.sample_entropy - out.codebook_entropy)
        results.append((*out, torch.autograd.grad([out.quantized, total], x, [grad, None])[0]))
    got, want = results
    torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=0, equal_nan=True)
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 3e-6}
    torch.testing.assert_close(got[2:5], want[2:5], **tolerance)
    # three gradients are rounded to the dtype before they are added up
    half = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 0.0)
    scale = float(want[5].abs().max())
    assert float((got[5].double() - want[5].double()).abs().max()) <= (tolerance["rtol"] + half) * 3 * scale


def test_two_runs_agree_to_the_last_bit() -> None:
    x = torch.randn(300_000, 12, device="cuda")
    first, second = (lk.lookup_free_quantize(x, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_training_step_is_captured_in_a_cuda_graph() -> None:
    x = torch.randn(4096, 10, device="cuda", requires_grad=True)
    lfq, fsq = lk.LFQ(10, commitment_loss_weight=0.25, backend="triton"), lk.FSQ([8, 5] * 5, backend="triton")

    def step() -> tuple[Tensor, ...]:
        signs, indices, loss = lfq(x)
        levels, positions, _ = fsq(x)
        return indices, loss, positions, *torch.autograd.grad(signs.sum() + levels.sum() + loss, x)

    for a, b in zip(replayed(step, x), step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_more_than_two_to_the_31_entries() -> None:
    dim = 16
    count = 2**31 // dim + 1000
    if torch.cuda.mem_get_info()[0] < 12 * count * dim:
        pytest.skip("needs about 26 GiB of free GPU memory")
    x = torch.full((count, dim), -1.0, device="cuda", dtype=torch.float16)
    x[-1000:, 3] = 2.0
    out = lk.lookup_free_quantize(x, codebook_entropy=False, backend="triton")
    assert (out.indices[-1000:] == 1 << 12).all() and (out.indices[:-1000] == 0).all()
    quantized, indices = lk.finite_scalar_quantize(x, [3] * dim, backend="triton")
    assert (quantized[-1000:, 3] == 1).all() and (indices[:-1000] == indices[0]).all()
    assert (indices[-1000:] == indices[0] + 2 * 3**3).all()
