"""Training steps of a backend's own kernels, beside the module in plain torch."""

from __future__ import annotations

from typing import Any

import torch

import lamkernels as lk
from lamkernels.ops.vector_quantize.gpu_step import ema_step, learned_step


def assert_steps_of_the_module(
    kernels: Any, rows: int, codes: int, dim: int, dtype: torch.dtype, atol: float
) -> None:  # fmt: skip
    """``atol`` is for sums of a few rows of size 1, whose rounding is relative to the largest of them."""
    vq = lk.VectorQuantize(dim, codes, decay=0.7, eps=1e-3, commitment_weight=0.3, backend="reference")
    ours = tuple(t.clone() for t in (vq.codebook, vq.cluster_size, vq.code_sums))
    for step in range(3):
        x = torch.randn(2, rows // 2, dim).to(dtype)
        if rows and step == 1:
            x[0, 3] = torch.nan
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        versions = [t._version for t in ours]
        quantized, indices, loss = ema_step(kernels, left, ours, "default", (0.7, 1e-3), 0.3)
        assert all(t._version > version for t, version in zip(ours, versions, strict=True))
        want = vq(right)
        torch.testing.assert_close(quantized, want[0], equal_nan=True)
        assert torch.equal(indices, want[1])
        torch.testing.assert_close(loss, want[2])
        for a, b in zip(ours, (vq.codebook, vq.cluster_size, vq.code_sums), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=atol)
        weight = torch.randn_like(x)
        ((quantized * weight).nan_to_num().sum() + 2 * loss).backward()
        ((want[0] * weight).nan_to_num().sum() + 2 * want[2]).backward()
        assert left.grad is not None and right.grad is not None
        torch.testing.assert_close(left.grad, right.grad)
        for a, b in zip(ours, (vq.codebook, vq.cluster_size, vq.code_sums), strict=True):
            a.copy_(b)  # else a row between two codes could fall on either side


def assert_learned_steps(
    kernels: Any, rows: int, codes: int, dim: int, dtype: torch.dtype, metric: str = "l2"
) -> None:  # fmt: skip
    """Steps whose codebook is learned by its gradient; some with no gradient of one of the outputs."""
    vq = lk.VectorQuantize(
        dim, codes, update="gradient", commitment_weight=0.3, codebook_weight=0.7, metric=metric, backend="reference"
    )
    for weight, of_loss in ((1.0, 2.0), (0.0, 1.0), (1.0, 0.0)):
        with torch.no_grad():
            vq.codebook.normal_()
        x = torch.randn(2, rows // 2, dim).to(dtype)
        if rows > 6:
            x[0, 3] = torch.nan
        left, right, codebook = (t.clone().detach().requires_grad_() for t in (x, x, vq.codebook))
        quantized, indices, loss = learned_step(kernels, left, codebook, metric, "default", (0.3, 0.7))
        want = vq(right)
        torch.testing.assert_close(quantized, want[0], equal_nan=True)
        assert torch.equal(indices, want[1])
        torch.testing.assert_close(loss, want[2])
        assert not indices.requires_grad and loss.requires_grad
        grads = torch.randn_like(x)
        for out, leaves in (((quantized, loss), (left, codebook)), ((want[0], want[2]), (right, vq.codebook))):
            terms = [(weight, (out[0] * grads).nan_to_num().sum()), (of_loss, out[1])]
            sum(w * term for w, term in terms if w).backward(inputs=leaves)  # type: ignore[union-attr]
        assert left.grad is not None and right.grad is not None and codebook.grad is not None
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(left.grad, right.grad, rtol=2 * rounding, atol=0.1 * rounding)
        torch.testing.assert_close(codebook.grad, vq.codebook.grad, rtol=1e-5, atol=1e-7)
        vq.codebook.grad = None
