"""Training steps of a backend's own kernels, beside the module in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lamkernels as lk
from lamkernels.ops.vector_quantize.gpu_step import ema_step, learned_step


def assert_steps_of_the_module(
    kernels: Any, rows: int, codes: int, dim: int, dtype: torch.dtype, atol: float, device: str = "cpu"
) -> None:
    """``atol`` is for sums of a few rows of size 1, whose rounding is relative to the largest of them."""
    vq = lk.VectorQuantize(dim, codes, decay=0.7, eps=1e-3, commitment_weight=0.3, backend="reference", device=device)
    ours = tuple(t.clone() for t in (vq.codebook, vq.cluster_size, vq.code_sums))
    for step in range(3):
        x = torch.randn(2, rows // 2, dim, device=device).to(dtype)
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
    kernels: Any, rows: int, codes: int, dim: int, dtype: torch.dtype, metric: str = "l2", device: str = "cpu"
) -> None:
    """Steps whose codebook is learned by its gradient; some with no gradient of one of the outputs."""
    vq = lk.VectorQuantize(
        dim, codes, update="gradient", commitment_weight=0.3, codebook_weight=0.7, metric=metric, backend="reference",
        device=device,
    )  # fmt: skip
    for weight, of_loss in ((1.0, 2.0), (0.0, 1.0), (1.0, 0.0)):
        with torch.no_grad():
            vq.codebook.normal_()
        x = torch.randn(2, rows // 2, dim, device=device).to(dtype)
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


def assert_learned_anyhow(kernels: Any, device: str) -> None:
    """Rows of every layout, gradients of every kind, and one input alone with a gradient, beside the operator."""
    codebook = torch.randn(9, 6, device=device)
    layouts = {
        "transposed": torch.randn(6, 40, device=device).T,
        "channels first": torch.randn(2, 6, 4, 5, device=device).movedim(1, -1),
        "every second entry": torch.randn(3, 7, 12, device=device)[..., ::2],
        "expanded": torch.randn(5, 1, 6, device=device).expand(5, 4, 6),
        "one row": torch.randn(6, device=device),
    }

    def step(leaf: Any, codes: Any, precision: str = "default") -> tuple[Any, Any]:
        quantized, _, loss = learned_step(kernels, leaf, codes, "l2", precision, (0.3, 0.7))
        return quantized, loss

    def operator(leaf: Any, codes: Any, precision: str = "default") -> tuple[Any, Any]:
        out = lk.vector_quantize(leaf, codes, precision=precision, backend="reference")  # type: ignore[arg-type]
        return out.quantized, 0.3 * out.commitment_loss + 0.7 * out.codebook_loss

    def gradients(take: Any, x: Any, needed: tuple[bool, bool], grads: Any, **options: Any) -> list[Any]:
        leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip((x, codebook), needed, strict=True)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return list(torch.autograd.grad(take(*leaves), wanted, grads, **options))

    for name, x in layouts.items():
        for needed in ((True, True), (True, False), (False, True)):
            weights = torch.randn(x.shape, device=device)
            for grad in (weights, torch._neg_view(weights), weights[..., :1].expand(x.shape)):
                grads = (grad, torch.tensor(2.0, device=device))
                pairs = zip(gradients(step, x, needed, grads), gradients(operator, x, needed, grads), strict=True)
                for mine, theirs in pairs:
                    torch.testing.assert_close(mine, theirs, msg=lambda m, name=name: f"{name}: {m}")
    x = layouts["every second entry"]
    many = (torch.randn(4, *x.shape, device=device), torch.randn(4, device=device))
    pairs = zip(*(gradients(t, x, (True, True), many, is_grads_batched=True) for t in (step, operator)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)
    grads = (many[0][0], many[1][0])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.movedim(0, -1).clone().movedim(-1, 0)):
        mine = gradients(step, x, (True, True), grads)
    theirs = gradients(operator, x, (True, True), grads)
    first = gradients(step, x, (True, True), grads, create_graph=True)
    for a, b, c in zip(mine, theirs, first, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c.detach(), b)
    for a, b in zip(step(x, codebook, "exact"), operator(x, codebook, "exact"), strict=True):
        torch.testing.assert_close(a, b)
    leaf = x.detach().requires_grad_()
    grad = torch.autograd.grad(step(leaf, codebook)[1], leaf, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), leaf)
