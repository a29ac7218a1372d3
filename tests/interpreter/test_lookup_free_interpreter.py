"""The quantisers without a learned codebook in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import lamkernels as lk
from lamkernels.ops.finite_scalar_quantize import reference as reference_scalar
from lamkernels.ops.finite_scalar_quantize import triton as scalar

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


def test_the_public_functions_reach_the_kernels() -> None:
    x = torch.randn(30, 4, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        quantized, indices = lk.finite_scalar_quantize(x, [8, 5, 5, 5], backend=backend)
        (grad,) = torch.autograd.grad(quantized.sum(), x)
        results.append((quantized, indices, grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
