"""A step whose kernels update the moving averages, beside the module in plain torch: for every backend that has one."""

from __future__ import annotations

from typing import Any

import torch

import lamkernels as lk
from lamkernels.ops.vector_quantize.gpu_step import ema_step


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
