"""Rows that do not lie one behind another: every backend reads them where they are, as if they were contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

import lamkernels as lk

K, D = 12, 6
# x and whether it has two codebooks
LAYOUTS = {
    "LAPO": lambda dtype: torch.randn(7, 2 * D * 4).to(dtype).view(7, 2, D, 4).permute(1, 0, 3, 2),  # (H, B, L, D)
    "channels first": lambda dtype: torch.randn(3, D, 4, 5).to(dtype).permute(0, 2, 3, 1),
    "columns": lambda dtype: torch.randn(D, 40).to(dtype).T,
    "every second entry": lambda dtype: torch.randn(40, 2 * D).to(dtype)[:, ::2],
    "part of each frame": lambda dtype: torch.randn(5, 9, D).to(dtype)[:, 2:7],
}
CASES = [("l2", "ste"), ("l2", "rotation"), ("cosine", "ste"), ("dot", "noise")]


def outputs(x: Tensor, codebook: Tensor, metric: str, gradient: str, backend: str) -> tuple[Tensor, ...]:
    """Of the lookup, the quantiser with its gradients, and the statistics; on x as it lies."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    mask = (torch.arange(x.shape[:-1].numel(), device=x.device) % 5 != 0).view(x.shape[:-1])
    noise = torch.linspace(-1, 1, x.numel(), device=x.device).to(x.dtype).view(x.shape) if gradient == "noise" else None
    out = lk.vector_quantize(x, codebook, mask=mask, noise=noise, metric=metric, gradient=gradient, backend=backend)  # type: ignore[arg-type]
    loss = out.quantized.float().square().sum() + 3 * out.commitment_loss + out.codebook_loss
    lookup = lk.nearest_code(x, codebook, metric=metric, return_distance=True, backend=backend)  # type: ignore[call-overload]
    statistics = lk.code_statistics(x, out.indices, codebook.shape[-2], backend=backend)  # type: ignore[arg-type]
    return (*out, *torch.autograd.grad(loss, (x, codebook)), *lookup, *statistics)


def assert_read_in_place(
    name: str, metric: str, gradient: str, backend: str, dtype: torch.dtype, device: str, codes: int = K
) -> None:
    """The results are those of a contiguous copy: to the bit, except where torch's own sums follow the strides."""
    torch.manual_seed(0)
    x = LAYOUTS[name](dtype).to(device)
    codebook = torch.randn(*x.shape[: x.ndim == 4 and name == "LAPO"], codes, D, device=device).to(dtype)
    pairs = zip(
        outputs(x, codebook, metric, gradient, backend),
        outputs(x.contiguous(), codebook, metric, gradient, backend),
        strict=True,
    )
    for mine, theirs in pairs:
        if metric == "cosine" or backend == "reference":
            torch.testing.assert_close(mine, theirs, equal_nan=True)
        else:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
