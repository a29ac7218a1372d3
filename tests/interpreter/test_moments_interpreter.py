"""Moments in Triton's interpreter, against the specification."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lamkernels.joint_moments import off_diagonal_covariance_loss
from lamkernels.ops.covariance import reference
from lamkernels.ops.covariance import triton as ours

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def agree(x, y, weights, lag, precision="default") -> None:
    tolerance = 1e-12 if x.dtype == torch.float64 or precision == "exact" else 1e-6
    got = ours.covariance(x, y, weights, lag, precision)
    want = reference.covariance(x, y, weights, lag, precision)
    size = want[3].norm().clamp(min=1e-30)
    torch.testing.assert_close(got[0], want[0], rtol=1e-14, atol=0)
    for mine, other in zip(got[1:3], want[1:3], strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    for mine, other in zip(got[3:], want[3:], strict=True):
        assert mine.shape == other.shape and mine.dtype == torch.float64
        assert (mine - other).norm() <= tolerance * torch.maximum(size, other.norm())
    for square in (got[3], got[5]):
        assert torch.equal(square, square.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_pairs_weights_and_lags(dtype, mean):
    x, y = (torch.randn(2, 90, d) + mean for d in (40, 5))
    x[0, 3, 0], x[1, 89, 39], y[0, 7, 4] = torch.nan, torch.inf, -torch.inf
    x, y, weights = x.to(dtype), y.to(dtype), torch.rand(2, 90).double()
    weights[:, 5:9] = 0
    agree(x, None, None, 0)
    agree(x, y, weights, 0)
    agree(x, None, weights[:, 4:], 4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 0, 3), (2, 1, 33), (1, 2100, 2), (1, 70, 64)], ids=str)
def test_shapes(shape):
    x = torch.randn(shape)
    agree(x, None, None, 0)
    agree(x, x[..., :1].contiguous(), None, 0)
    agree(x, None, None, 1)


@pytest.mark.parametrize("precision", ["default", "exact"])
def test_rows_that_are_out_spoil_nothing_where_a_tile_holds_whole_rows(precision):
    x = torch.randn(2, 1100, 20) + 5
    x[:, ::7, 4], x[:, ::7, 5:] = torch.nan, 1e30
    x[0, 1], x[0, 2, 0] = -torch.inf, torch.inf
    agree(x, None, None, 0, precision)
    for found in ours.covariance(torch.full((1, 9, 20), torch.nan), None, None, 0, precision):
        assert not found.any()


def test_strides_and_exact():
    x = torch.randn(33, 70, 1).transpose(0, 2) + 1000  # (1, 70, 33), columns far apart
    agree(x, None, None, 0)
    agree(x, None, None, 2, "exact")
    agree(x[:, :1].expand(1, 50, 33), None, None, 0, "exact")


def test_two_runs_agree_to_the_last_bit():
    x = torch.randn(1, 300, 20)
    first, second = (ours.covariance(x, None, None, 3, "default") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_loss_and_its_gradient():
    x = torch.randn(300, 6) + 3
    x[:, 1] += 0.5 * x[:, 0]
    x[7, 2], x[9, 0] = torch.nan, torch.inf
    leaf, other = x.clone().requires_grad_(), x.double().requires_grad_()
    loss, want = (off_diagonal_covariance_loss(t, backend=b) for t, b in ((leaf, "triton"), (other, "reference")))
    loss.backward(), want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=0, atol=1e-5 * float(other.grad.abs().max()))
    assert not leaf.grad[[7, 9]].any()
