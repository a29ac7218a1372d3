"""The quantisers without a learned codebook in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import lamkernels as lk
from lamkernels.ops.finite_scalar_quantize import reference as reference_scalar
from lamkernels.ops.finite_scalar_quantize import triton as scalar
from lamkernels.ops.lookup_free_quantize import reference as reference_signs
from lamkernels.ops.lookup_free_quantize import triton as signs

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def rows(heads: int, count: int, dim: int, dtype: torch.dtype) -> Tensor:
    x = 1.5 * torch.randn(heads, count, dim, generator=torch.Generator().manual_seed(count)).to(dtype)
    if count > 4:
        x[0, 3, 0], x[-1, count - 1, dim - 1], x[-1, 1, 0] = torch.nan, torch.inf, -torch.inf
    return x


def gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "contiguous": torch.randn(shape).to(dtype),
        "expanded": torch.ones((), dtype=dtype).expand(shape),
        "transposed": torch.randn(shape[::-1]).to(dtype).permute(2, 1, 0),
    }


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "levels",
    [[8, 5, 5, 5], [2], [2, 2, 2], [300, 3], [3 + d % 2 for d in range(33)]],
    ids=lambda v: f"{len(v)} columns",
)
def test_finite_scalar_agrees_with_the_specification(levels: list[int], dtype: torch.dtype, symmetric: bool) -> None:
    for heads, count in ((1, 1), (2, 75)):
        x = rows(heads, count, len(levels), dtype)
        got = scalar.finite_scalar_quantize(x, levels, symmetric)
        want = reference_scalar.finite_scalar_quantize(x, levels, symmetric)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        for grad in gradients((heads, count, len(levels)), dtype).values():
            a = scalar.finite_scalar_quantize_backward(x, got[1], grad, levels, symmetric)
            b = reference_scalar.finite_scalar_quantize_backward(x, got[1], grad, levels, symmetric)
            assert a.dtype == b.dtype == dtype
            torch.testing.assert_close(a, b)


def test_finite_scalar_strides_and_no_rows() -> None:
    x = torch.randn(40, 3, 8)[:, :, ::2].transpose(0, 1)
    got = scalar.finite_scalar_quantize(x, [8, 5, 5, 5], False)
    want = scalar.finite_scalar_quantize(x.contiguous(), [8, 5, 5, 5], False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert scalar.finite_scalar_quantize(torch.empty(2, 0, 2), [4, 4], False)[1].shape == (2, 0)
    empty = torch.empty(2, 0, 2)
    indices = torch.empty(2, 0, dtype=torch.int64)
    assert scalar.finite_scalar_quantize_backward(empty, indices, empty, [4, 4], False).shape == (2, 0, 2)


@pytest.mark.parametrize("keep_zero", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 75, 5), (1, 33, 62)])
def test_lookup_free_agrees_with_the_specification(
    shape: tuple[int, int, int], dtype: torch.dtype, masked: bool, keep_zero: bool
) -> None:
    heads, count, dim = shape
    x = rows(heads, count, dim, dtype)
    x[0, ::3, dim // 2] = 0
    mask = torch.arange(heads * count).reshape(heads, count) % 4 != 1 if masked else None
    scale = 0.5 if dtype == torch.bfloat16 else 0.3  # the interpreter truncates to bf16 where a GPU rounds
    arguments = (mask, scale, 1.1, keep_zero)
    got, want = (module.lookup_free_quantize(x, *arguments) for module in (signs, reference_signs))
    for i in (0, 1, 4):
        torch.testing.assert_close(got[i], want[i], rtol=0, atol=0, equal_nan=True)
    for i in (2, 3):
        assert got[i].dtype == want[i].dtype
        torch.testing.assert_close(got[i], want[i], rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0)
    loss_grads = torch.tensor([3.0, 0.5])[:heads].to(got[2].dtype), torch.ones((), dtype=got[2].dtype).expand(heads)
    for grad in (None, *gradients(shape, dtype).values()):
        arguments = (x, got[1], got[4], grad, *loss_grads, scale, 1.1, keep_zero)
        a, b = (module.lookup_free_quantize_backward(*arguments) for module in (signs, reference_signs))
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b)


def test_lookup_free_strides_reproducibility_and_no_rows() -> None:
    x = torch.randn(40, 3, 8)[:, :, ::2].transpose(0, 1)
    for layout in (x, x.contiguous(), x[:1, :1].expand(3, 40, 4)):
        got = signs.lookup_free_quantize(layout, None, 1.0, 2.0, False)
        again = signs.lookup_free_quantize(layout.contiguous(), None, 1.0, 2.0, False)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    out = signs.lookup_free_quantize(torch.empty(2, 0, 3), None, 1.0, 2.0, False)
    assert out[0].shape == (2, 0, 3) and all(bool((t == 0).all()) for t in out[2:])
    zero = torch.zeros(2)
    grad = signs.lookup_free_quantize_backward(out[0], out[1], out[4], None, zero, zero, 1.0, 2.0, False)
    assert grad.shape == (2, 0, 3)


def test_lookup_free_of_huge_and_tiny_entries() -> None:
    x = torch.tensor([[[3e38, -3e38, 1e-30, -1e-45]]])
    got = signs.lookup_free_quantize(x, None, 1.0, 400.0, False)
    assert got[1].item() == 0b1010
    torch.testing.assert_close(got[3], torch.tensor([2.0]).log() * 2)
    torch.testing.assert_close(got[2], torch.tensor([torch.inf]))
    one = torch.ones(1)
    grad = signs.lookup_free_quantize_backward(x, got[1], got[4], None, 0 * one, one, 1.0, 400.0, False)
    assert bool(grad.isfinite().all())


def test_the_public_functions_reach_the_kernels() -> None:
    x = torch.randn(30, 4, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        quantized, indices = lk.finite_scalar_quantize(x, [8, 5, 5, 5], backend=backend)
        (grad,) = torch.autograd.grad(quantized.sum(), x)
        out = lk.lookup_free_quantize(x, inv_temperature=0.5, backend=backend)
        (signs_grad,) = torch.autograd.grad(out.quantized.sum() + sum(out[2:]), x)
        results.append((quantized, indices, grad, *out, signs_grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
