"""Moments on a real GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import replayed

from lamkernels.joint_moments import moments, off_diagonal_covariance_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; there is none here"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ["default", "exact"])
@pytest.mark.parametrize("shape", [(1, 3), (100_003, 20), (20_000, 64), (5000, 500)], ids=str)
def test_agrees_with_the_specification(shape: tuple[int, int], precision: str, dtype: torch.dtype) -> None:
    x = (torch.randn(shape, device="cuda") + 10).to(dtype)
    if shape[0] > 9:
        x[3, 0], x[9, 2] = torch.nan, torch.inf
    for lag, weighted in ((None, False), (None, True), (5, True)):
        weights = torch.rand(max(shape[0] - (lag or 0), 0), device="cuda") if weighted else None
        got, want = (
            moments(x, lag=lag, weights=weights, precision=precision, backend=name) for name in ("triton", "reference")
        )
        tolerance = 1e-12 if precision == "exact" or dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got.weight, want.weight, rtol=1e-14, atol=0)
        for name in ("xx", "xy", "yy"):
            mine, other = getattr(got, name), getattr(want, name)
            if other is not None:
                assert (mine - other).norm() <= tolerance * want.xx.norm(), name


def test_two_runs_agree_to_the_last_bit() -> None:
    x = torch.randn(300_000, 48, device="cuda")
    first, second = (moments(x, lag=1, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_loss_waits_for_nothing_and_is_that_of_the_specification() -> None:
    x = torch.randn(5000, 20, device="cuda") + 3
    x[:, 1] += 0.5 * x[:, 0]
    x[7, 2] = torch.nan
    leaf, other = x.clone().requires_grad_(), x.double().requires_grad_()
    off_diagonal_covariance_loss(leaf, backend="triton").backward()  # compiles
    leaf.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = off_diagonal_covariance_loss(leaf, backend="triton")
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = off_diagonal_covariance_loss(other, backend="reference")
    want.backward()
    assert leaf.grad is not None and other.grad is not None
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=0)
    torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=0, atol=1e-4 * float(other.grad.abs().max()))


def test_the_loss_is_captured_in_a_cuda_graph() -> None:
    x = torch.randn(4096, 32, device="cuda", requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        loss = off_diagonal_covariance_loss(x, backend="triton")
        return loss, *torch.autograd.grad(loss, x)

    for a, b in zip(replayed(step, x), step(), strict=True):
        torch.testing.assert_close(a, b)
