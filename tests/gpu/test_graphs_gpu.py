"""Whole training steps in CUDA graphs and in compiled code that uses them: the same as eager, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lamkernels as lk
from lamkernels.graphs import Graphed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; there is none here"),
]
BACKENDS = [name for name in ("triton", "cuda") if lk.available_backends()[name].available]


class Bottlenecked(nn.Module):
    """The least latent action model: two frames in, codes between, the second frame out."""

    def __init__(self, backend: Any, **options: Any) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(128, 16), nn.Linear(80, 64)
        self.vq = lk.VectorQuantize(16, 8, backend=backend, **options)

    def forward(self, frames: Tensor, following: Tensor) -> Tensor:
        quantized, _, loss = self.vq(self.encode(torch.cat([frames, following], -1)))
        found: Tensor = self.decode(torch.cat([frames, quantized], -1))
        return F.mse_loss(found, following) + loss


def trained(backend: str, wrap: Callable[[Any], Any], steps: int = 8) -> list[Tensor]:
    torch.manual_seed(3)
    model = Bottlenecked(backend, init="kmeans", dead_code_threshold=0.5).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)

    def step(frames: Tensor, following: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(frames, following)
        loss.backward()
        optimizer.step()
        return loss.detach()

    run, losses = wrap(step), []
    for _ in range(steps):
        losses.append(run(*torch.randn(2, 96, 64, device="cuda")).clone())
    return [*losses, *model.state_dict().values()]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_graphed_training_run_is_the_eager_one(name: str) -> None:
    eager, graphed = trained(name, lambda step: step), trained(name, Graphed)
    assert all(torch.equal(a, b) for a, b in zip(eager, graphed, strict=True))


def test_what_a_graph_cannot_take_is_said() -> None:
    step = Graphed(lambda x: x + 1, warmup=1)
    x = torch.ones(3, device="cuda")
    assert step(x).tolist() == step(x).tolist() == step(2 * x - 1).tolist() == [2.0] * 3
    with pytest.raises(ValueError, match=r"\(4,\).*\(3,\)"):
        step(torch.ones(4, device="cuda"))
    asking = Graphed(lambda x: x * x.sum().item(), warmup=1)
    asking(x)
    here = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="cannot be captured"):
        asking(x)
    assert torch.cuda.current_stream() == here
    assert torch.randn(1000, device="cuda").std() > 0.5  # torch's generator is out of the capture


@pytest.mark.parametrize("name", BACKENDS)
def test_make_graphed_callables_takes_the_module(name: str) -> None:
    vq = lk.VectorQuantize(16, 8, backend=name, device="cuda")
    twin = lk.VectorQuantize(16, 8, backend=name, device="cuda")
    start = {name: t.clone() for name, t in vq.state_dict().items()}
    sample = torch.randn(96, 16, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(vq, (sample,))
    for module in (vq, twin):  # its warm-up trained on the sample
        module.load_state_dict(start)
    for _ in range(3):
        left = torch.randn(96, 16, device="cuda", requires_grad=True)
        right = left.detach().clone().requires_grad_()
        for module, x in ((graphed, left), (twin, right)):
            quantized, _, loss = module(x)
            (quantized.square().sum() + loss).backward()
        assert left.grad is not None and right.grad is not None
        assert torch.equal(left.grad, right.grad) and torch.equal(vq.codebook, twin.codebook)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # torch's advice to the user
@pytest.mark.parametrize("name", BACKENDS[:1])
def test_reduce_overhead_is_eager(name: str) -> None:
    torch.manual_seed(4)
    model, twin = (Bottlenecked(name).cuda().train() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        frames, following = torch.randn(2, 96, 64, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        for network in (compiled, twin):
            network(frames, following).backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
            a.grad = b.grad = None
        torch.testing.assert_close(model.vq.codebook, twin.vq.codebook, rtol=1e-4, atol=1e-5)
