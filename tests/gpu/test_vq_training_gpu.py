"""A training step with everything on waits for nothing, and a CUDA graph replays it with new draws."""

from __future__ import annotations

import pytest
import torch
from step_cases import assert_learned_anyhow, assert_learned_steps, assert_steps_of_the_module

import lamkernels as lk
from lamkernels.lam.measure import count_operators

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; there is none here"),
]


@pytest.mark.parametrize(("rows", "codes", "dim"), [(256, 8, 32), (600, 300, 200)])  # one tile; several chunks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_move_the_averages_as_torch_would(rows: int, codes: int, dim: int, dtype: torch.dtype) -> None:
    triton_step = pytest.importorskip("lamkernels.ops.vector_quantize.triton_step")
    assert_steps_of_the_module(triton_step, rows, codes, dim, dtype, atol=1e-6, device="cuda")
    assert_learned_steps(triton_step, rows, codes, dim, dtype, device="cuda")


def test_a_learned_codebook_takes_rows_and_gradients_of_every_kind() -> None:
    assert_learned_anyhow(pytest.importorskip("lamkernels.ops.vector_quantize.triton_step"), "cuda")


def test_dead_codes_of_a_cosine_codebook_are_replaced_before_its_backward() -> None:
    vq = lk.VectorQuantize(6, 32, update="gradient", metric="cosine", dead_code_threshold=2.0, device="cuda")
    for _ in range(3):
        quantized, _, loss = vq(torch.randn(200, 6, device="cuda", requires_grad=True))
        (quantized.square().mean() + loss).backward()
    assert vq.codebook.grad is not None and bool(vq.codebook.grad.isfinite().all())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_step_and_its_backward_are_three_launches(update: str) -> None:
    vq = lk.VectorQuantize(16, 64, update=update, device="cuda")
    x = torch.randn(256, 16, device="cuda", requires_grad=True)
    leaves = [x, *vq.parameters()]
    grads = torch.randn_like(x), torch.ones((), device="cuda")

    def step() -> None:
        quantized, _, loss = vq(x)
        torch.autograd.grad((quantized, loss), leaves, grads)

    step()  # compiles
    _, launches = count_operators(step, torch.device("cuda"))
    if not launches:
        pytest.skip("the profiler sees no launches here")
    assert launches == 3


def test_a_learned_codebook_takes_the_step_of_its_own() -> None:
    with pytest.raises(ValueError, match="metric is 'L2'"):
        vq = lk.VectorQuantize(16, 64, update="gradient", device="cuda")
        vq.metric = "L2"  # type: ignore[assignment]
        vq(torch.randn(256, 16, device="cuda"))
    vq = lk.VectorQuantize(16, 64, update="gradient", device="cuda")
    quantized, _, loss = vq(torch.randn(256, 16, device="cuda", requires_grad=True))
    assert "LearnedStep" in type(loss.grad_fn).__name__ and loss.grad_fn is quantized.grad_fn


def test_two_runs_leave_the_same_bits() -> None:
    def trained() -> list[torch.Tensor]:
        torch.manual_seed(0)
        vq = lk.VectorQuantize(40, 500, dead_code_threshold=1.0, device="cuda")
        for _ in range(4):
            x = torch.randn(20_000, 40, device="cuda", requires_grad=True)
            quantized, _, loss = vq(x)
            (quantized.square().mean() + loss).backward()
        return [x.grad, quantized.detach(), *vq.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(), strict=True))


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_step_with_dead_codes_and_health_never_synchronises(update: str) -> None:
    vq = lk.VectorQuantize(
        16, 64, update=update, dead_code_threshold=2.0, health=lk.CodebookHealth(64, window=3), device="cuda"
    )
    batches = torch.randn(6, 256, 16, device="cuda")
    vq(batches[0])  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in batches[1:]:
            vq(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert vq.health is not None
    report = vq.health.read()
    assert report.updates == 3 and report.rows == 3 * 256 and report.replaced > 0


def test_a_graph_draws_other_rows_at_each_replay() -> None:
    vq = lk.VectorQuantize(4, 32, update="gradient", decay=1.0, dead_code_threshold=2.0, device="cuda")
    x = torch.randn(4096, 4, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                vq(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            vq(x)
        seen = []
        for _ in range(3):
            vq.cluster_size.zero_()
            graph.replay()
            seen.append(vq.codebook.detach().clone())
    for codes in seen:
        assert (codes[:, None] == x).all(-1).any(1).all()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
