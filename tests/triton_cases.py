"""Data and comparisons that the tests of the Triton kernels share, in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def more_hard_data() -> dict[str, tuple[Tensor, Tensor]]:
    """Rows and codes (fp32) for what contract.hard_data leaves out: it aims at the branches of the Triton kernels."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def grid(*shape: int) -> Tensor:
        return torch.randint(0, 3, shape, generator=generator).float()

    spread = normal(11, 8) * torch.logspace(-3, 30, 11)[:, None]
    tiny = normal(11, 8) * 1e-28
    constant = torch.full((90, 1), 7.0)
    last = normal(20, 12)
    last[1:] = torch.nan
    return {
        "integers with a constant column": (
            torch.cat([grid(90, 2), constant], 1),
            torch.cat([grid(7, 2), constant[:7]], 1),
        ),
        "codes of every size": (spread[torch.arange(33) % 11] * 1.01, spread),
        "codes too small for fp32": (tiny[torch.arange(33) % 11] + 1e-29 * normal(33, 8), tiny),
        "one finite code": (normal(20, 12), last.flip(0)),
        "zero rows": (torch.zeros(5, 8), normal(30, 8)),
        "one code": (normal(20, 6), normal(1, 6)),
        "one entry": (normal(50, 1), normal(7, 1)),
        "one row": (normal(1, 10), normal(3, 10)),
    }


def thrown_out() -> tuple[Tensor, Tensor, Tensor]:
    """Rows, codes of which most were thrown far out, one of them not finite, and the code that each row is beside."""
    generator = torch.Generator().manual_seed(0)
    codebook = 0.1 * torch.randn(7, 8, generator=generator)
    codebook[2:] += 1e5
    codebook[6, 3] = torch.inf
    expected = torch.arange(40) % 2
    return codebook[expected] + 0.01 * torch.randn(40, 8, generator=generator), codebook, expected


def assert_quantized_like(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """The nine outputs of vector_quantize: indices, outputs and counts equal, losses and sums to rounding."""
    quantized, indices, commitment, codebook_loss, counts, sums, residual_sums, num_rows, codes = range(9)
    for i in (quantized, indices, counts, num_rows, codes):
        torch.testing.assert_close(got[i], want[i], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[commitment], got[codebook_loss])
    for i in (commitment, codebook_loss):
        torch.testing.assert_close(got[i], want[i], rtol=1e-6, atol=0.0)
    for i in (sums, residual_sums):  # rounding is relative to the largest summand
        scale = float(want[sums].abs().max().clamp(min=1))
        torch.testing.assert_close(got[i], want[i], rtol=1e-6, atol=1e-6 * scale)


def on_a_side_stream(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What ``call`` gives for values of ``x`` that come late, on a stream that waits for nothing else."""
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        late.copy_(x)
        got = call(late)
    stream.synchronize()
    return got


def replayed(step: Callable[[], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    """What a CUDA graph of ``step`` gives for new values of ``x``, which stay in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    return captured
