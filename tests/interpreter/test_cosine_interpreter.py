"""Normalised rows in Triton's interpreter beside the operators of torch that a CPU takes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lamkernels.ops import triton_cosine
from lamkernels.ops.cosine import unit_or_nan


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", triton_cosine.TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 5), (2, 9, 300)], ids=str)
def test_rows_and_their_gradient(shape, dtype, wanted):
    x = torch.randn(shape).to(dtype)
    rows = x.view(-1, shape[-1])
    if len(rows) > 9:
        rows[1], rows[3, -1], rows[4, 0], rows[5], rows[6] = 0, torch.nan, torch.inf, 1e-30, 6e4
        rows[7] = 1e-4 if dtype == torch.float16 else 1e30
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = triton_cosine.unit_or_nan(mine, wanted), unit_or_nan(theirs, wanted)
    grad = torch.randn(shape, dtype=wanted)
    got.backward(grad), want.backward(grad)
    exact = 1e-14 if wanted == torch.float64 else 1e-7
    torch.testing.assert_close(got, want, rtol=exact, atol=exact, equal_nan=True)
    rounding = max(torch.finfo(dtype).eps, torch.finfo(wanted).eps)
    finite = torch.where(x.isfinite().all(-1, keepdim=True), x.double(), 0.0)
    length = finite.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    mine, theirs = mine.grad.double() * length, theirs.grad.double() * length
    torch.testing.assert_close(mine, theirs, rtol=0, atol=float(4 * rounding * grad.abs().max()))


def test_rows_may_be_overwritten_and_gradients_may_be_of_any_kind():
    rows = torch.randn(7, 5)
    mine, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    got, want = triton_cosine.unit_or_nan(mine, torch.float32), unit_or_nan(theirs, torch.float32)
    grads = torch.randn(3, 7, 5)
    for grad in (grads[0], torch._neg_view(grads[1]), grads[2].T.contiguous().T, grads[0, :1].expand(7, 5)):
        pair = (
            torch.autograd.grad(out, leaf, grad, retain_graph=True)[0] for out, leaf in ((got, mine), (want, theirs))
        )
        torch.testing.assert_close(*pair)
    pair = (
        torch.autograd.grad(out, leaf, grads, retain_graph=True, is_grads_batched=True)[0]
        for out, leaf in ((got, mine), (want, theirs))
    )
    torch.testing.assert_close(*pair)
    (again,) = torch.autograd.grad(got, mine, grads[0], retain_graph=True, create_graph=True)
    expected = torch.autograd.grad(want, theirs, grads[0])[0]
    torch.testing.assert_close(again.detach(), expected)
    with torch.no_grad():
        mine.copy_(torch.full_like(mine, torch.nan))  # as a dead code that is replaced
    torch.testing.assert_close(torch.autograd.grad(got, mine, grads[0])[0], expected)
    assert triton_cosine.unit_or_nan(rows[:0], torch.float32).shape == (0, 5)
