"""On a GPU, a step of the drop-in forms waits for nothing, and one with buffers runs in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from lamkernels.bench.compat import CASES, Step
from lamkernels.bench.stock import lapo as stock

from lamkernels.compat.lapo import VQEmbeddingEMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; there is none here"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.project)
def test_a_step_is_that_of_the_plain_form_and_waits_for_nothing(case):
    plain, fused = (Step(case, make, "cuda") for make in (case.plain, case.fused))
    torch.testing.assert_close(fused.results(), plain.results(), rtol=1e-4, atol=1e-5)
    fused.module.numpy_usage = False
    fused()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_in_a_graph_is_training():
    torch.manual_seed(0)
    eager = VQEmbeddingEMA(stock.VQConfig()).cuda()
    captured = VQEmbeddingEMA(stock.VQConfig()).cuda()
    captured.load_state_dict(eager.state_dict())
    data, x = torch.randn(6, 512, 128, device="cuda"), torch.zeros(512, 128, device="cuda", requires_grad=True)

    def step(module):
        z_q, loss, _, _ = module(x)
        return torch.autograd.grad(z_q.sum() + loss, x)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for batch in data[:3]:
            x.data.copy_(batch)
            step(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = step(captured)
    for number, batch in enumerate(data):
        x.data.copy_(batch)
        expected = step(eager)
        if number >= 3:
            graph.replay()
            torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(captured.state_dict(), eager.state_dict())
