"""The drop-in forms of vector-quantize-pytorch on a real GPU: no step waits for it, and it trains as the CPU does."""

from __future__ import annotations

import copy

import pytest
import torch

from lamkernels.compat import vector_quantize_pytorch as ours

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; there is none here"),
]

MODULES = {
    "default": lambda: ours.VectorQuantize(16, 32),
    "dead codes, cosine": lambda: ours.VectorQuantize(16, 32, threshold_ema_dead_code=2, use_cosine_sim=True),
    "heads": lambda: ours.VectorQuantize(16, 32, heads=2, codebook_dim=8, separate_codebook_per_head=True),
    "learnable": lambda: ours.VectorQuantize(16, 32, learnable_codebook=True, ema_update=False),
    "residual": lambda: ours.ResidualVQ(dim=16, codebook_size=32, num_quantizers=3),
    "groups": lambda: ours.GroupedResidualVQ(dim=16, groups=2, codebook_size=32, num_quantizers=2),
    "fsq": lambda: ours.FSQ([5, 4], dim=16),
    "lfq": lambda: ours.LFQ(codebook_size=16, dim=16),
    "simvq": lambda: ours.SimVQ(16, 32),
}


def step(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.detach().requires_grad_()
    quantized, indices, *losses = module(x)
    (quantized.square().mean() + sum(loss.sum() for loss in losses)).backward()
    assert x.grad is not None
    return quantized.detach(), indices, x.grad


@pytest.mark.parametrize("name", MODULES)
def test_a_training_step_does_not_wait_for_the_gpu(name: str) -> None:
    module, x = MODULES[name]().cuda(), torch.randn(4, 64, 16, device="cuda")
    step(module, x)  # reads the flag of the k-means and the levels once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [name for name in MODULES if name != "dead codes, cosine"])
def test_the_gpu_trains_as_the_cpu(name: str) -> None:
    module = MODULES[name]()
    twin = copy.deepcopy(module).cuda()
    for _ in range(10):
        x = torch.randn(4, 64, 16)
        mine, theirs = step(twin, x.cuda()), step(module, x)
        assert torch.equal(mine[1].cpu(), theirs[1])
        torch.testing.assert_close(mine[0].cpu(), theirs[0], rtol=1e-4, atol=1e-5)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key].cpu(), value, rtol=1e-4, atol=1e-5)
