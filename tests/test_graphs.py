"""Steps in CUDA graphs, as far as a machine without a GPU can tell."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamkernels as lk
from lamkernels.graphs import Graphed


@pytest.mark.parametrize(
    "options",
    [
        {"update": "ema", "dead_code_threshold": 1.0},
        {"update": "gradient", "dead_code_threshold": 1.0, "gradient": "rotation"},
        {"update": "ema", "metric": "cosine", "gradient": "noise"},
    ],
    ids=str,
)
def test_a_training_step_asks_nothing_of_a_gpu(options: dict[str, Any]) -> None:
    """Tensors without values: asking for one, or for a shape that needs one, raises, as a capture would."""
    health = lk.CodebookHealth(8, window=3) if options["update"] == "ema" else None
    vq = lk.VectorQuantize(16, 8, backend="triton", health=health, device="meta", **options).train()
    encode = nn.Linear(12, 16, device="meta")
    for _ in range(2):
        quantized, indices, loss = vq(encode(torch.empty(2, 30, 12, device="meta")))
        (quantized.square().mean() + loss).backward()
        assert encode.weight.grad is not None and encode.weight.grad.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()
    with pytest.raises(NotImplementedError, match="nonzero"):
        indices.nonzero()


class Recorder:
    """Stands in for torch.cuda.CUDAGraph: what is called while it captures is called again by a replay."""

    def __init__(self) -> None:
        self.tape: list[Any] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for call in self.tape:
            call()


def test_each_call_is_one_step_on_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, seen, outputs = Recorder(), [], torch.zeros(2)
    capturing = False

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        def work() -> None:
            seen.append((x + y).tolist())
            outputs.copy_(x + y)

        graph.tape.append(work) if capturing else work()
        return {"sum": outputs}

    @contextlib.contextmanager
    def capture(given: Recorder) -> Any:
        nonlocal capturing
        assert given is graph
        capturing = True
        yield
        capturing = False

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    graphed = Graphed(step, warmup=2)
    for i in range(5):
        assert graphed(torch.full((2,), float(i)), torch.ones(2))["sum"].tolist() == [i + 1.0] * 2
    assert seen == [[i + 1.0] * 2 for i in range(5)] and graph.replays == 3 and graphed.calls == 5
    with pytest.raises(ValueError, match=r"argument 1 is \(3,\).*captured with \(2,\)"):
        graphed(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="1 arguments; the graph was captured with 2"):
        graphed(torch.ones(2))


def test_on_the_cpu_the_step_is_called_as_it_is() -> None:
    graphed = Graphed(lambda x: x + 1, warmup=1)
    for _ in range(3):
        assert graphed(torch.ones(2)).tolist() == [2.0, 2.0]
    assert graphed.calls == 3
    with pytest.raises(TypeError, match="by position"):
        graphed(3)
    with pytest.raises(TypeError, match="step is a int"):
        Graphed(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup is 0"):
        Graphed(lambda x: x, warmup=0)
