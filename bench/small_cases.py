"""``python -m bench.small_cases``: every operator once, at small sizes with tails, for a memory checker to watch.

``compute-sanitizer`` slows kernels down by orders of magnitude, so this is no test suite: it takes each kernel and each
path of it, forward and backward, and checks that what comes out is finite.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import lamkernels as lk
from lamkernels.ops.cuda_common import HOPPER

CUDA_CASES = ("lookup", "lookup, exact", "quantise", "quantise, dot, bf16", "statistics", "module")  # of csrc/
HOPPER_CASES = ("lookup, many codes, bf16", "lookup, many codes, fp16", "moments, 260 columns")
SMALL, LARGE = (130, 5, 12), (70, 1030, 33)  # rows, codes, dim: one resident tile, and streamed tiles; both with tails
MANY, WIDEST = (300, 700, 40), (300, 300, 256)


def cases(device: str, backend: Any) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """By name, calls that return what has to be finite."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def lookup(shape: tuple[int, int, int], dtype: torch.dtype, **options: Any) -> Sequence[Tensor]:
        x, codebook = normal(shape[0], shape[2], dtype=dtype), normal(*shape[1:], dtype=dtype)
        return lk.nearest_code(x, codebook, return_distance=True, backend=backend, **options)

    def quantise(shape: tuple[int, int, int], dtype: torch.dtype, **options: Any) -> Sequence[Tensor]:
        x, codebook = normal(shape[0], shape[2], dtype=dtype), normal(*shape[1:], dtype=dtype)
        x.requires_grad_()
        codebook.requires_grad_()
        mask = torch.arange(shape[0], device=device) % 5 != 3
        out = lk.vector_quantize(x, codebook, mask=mask, backend=backend, **options)
        differentiate(out.quantized.square().mean(), out.commitment_loss.sum(), out.codebook_loss.sum())
        return [out.quantized, out.sums, *gradients(x, codebook)]

    def statistics(shape: tuple[int, int, int]) -> Sequence[Tensor]:
        indices = torch.randint(shape[1], shape[:1], device=device)
        return lk.code_statistics(normal(shape[0], shape[2]), indices, shape[1], backend=backend)

    def scalars() -> Sequence[Tensor]:
        x = normal(130, 4).requires_grad_()
        quantized, indices = lk.finite_scalar_quantize(x, [8, 5, 5, 5], backend=backend)
        differentiate(quantized.square().sum())
        return [quantized, indices, *gradients(x)]

    def lookup_free() -> Sequence[Tensor]:
        x = normal(130, 9).requires_grad_()
        out = lk.lookup_free_quantize(x, backend=backend)
        differentiate(*(t.sum() for t in out if t is not None and t.requires_grad))
        return gradients(x)

    def moments(dim: int, **options: Any) -> Sequence[Tensor]:
        found = lk.moments(normal(300, dim), lag=2, backend=backend, **options)
        return [t for t in found if t is not None]

    def module(update: Any) -> Sequence[Tensor]:
        quantize = lk.VectorQuantize(12, 5, update=update, backend=backend, device=device)
        x = normal(130, 12).requires_grad_()
        quantized, _, loss = quantize(x)
        differentiate(quantized.square().mean(), loss.sum())
        return [quantized, quantize.codebook, *gradients(x)]

    single, half, double = torch.float32, torch.bfloat16, torch.float64
    return {
        "lookup": lambda: lookup(SMALL, single),
        "lookup, cosine": lambda: lookup(SMALL, single, metric="cosine"),
        "lookup, exact": lambda: lookup(SMALL, single, precision="exact"),
        "lookup, streamed": lambda: lookup(LARGE, single),
        "lookup, streamed, bf16": lambda: lookup(LARGE, half, metric="dot"),
        "lookup, many codes, bf16": lambda: lookup(MANY, half),
        "lookup, many codes, fp16": lambda: lookup(WIDEST, torch.float16),
        "quantise": lambda: quantise(SMALL, single),
        "quantise, rotation": lambda: quantise(SMALL, single, gradient="rotation"),
        "quantise, noise": lambda: quantise(SMALL, half, gradient="noise"),
        "quantise, dot, bf16": lambda: quantise(SMALL, half, metric="dot"),
        "quantise, cosine": lambda: quantise(SMALL, single, metric="cosine"),
        "quantise, streamed, cosine": lambda: quantise(LARGE, half, metric="cosine"),
        "quantise, streamed": lambda: quantise(LARGE, single),
        "quantise, fp64": lambda: quantise(SMALL, double),
        "statistics": lambda: statistics(SMALL),
        "statistics, sorted": lambda: statistics(LARGE),
        "finite scalar": scalars,
        "lookup-free": lookup_free,
        "moments": lambda: moments(20),
        "moments, 260 columns": lambda: moments(260),
        "moments, wide, exact": lambda: moments(70, precision="exact"),
        "module": lambda: module("ema"),
        "module, learned": lambda: module("gradient"),
    }


def differentiate(*losses: Tensor) -> None:
    torch.autograd.backward(losses)


def gradients(*leaves: Tensor) -> list[Tensor]:
    """Of tensors that each have one: a missing one raises, as nothing else would show it."""
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if len(found) < len(leaves):
        raise RuntimeError("a leaf has no gradient")
    return found


def asked_device(program: str, argv: Sequence[str] | None) -> str:
    """The value of --device; "" where that is a GPU and there is none, which is said."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device: str = parser.parse_args(argv).device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"python -m {program}: torch finds no CUDA or ROCm device", file=sys.stderr)
        return ""
    return device


def main(argv: Sequence[str] | None = None) -> int:
    """Runs them; 1 when something is not finite, 2 without a GPU that was asked for."""
    device = asked_device("bench.small_cases", argv)
    if not device:
        return 2
    torch.manual_seed(0)
    chosen = cases(device, "triton" if device == "cuda" else "auto")
    available, reason = lk.available_backends()["cuda"]
    if device == "cuda" and available:
        compiled = cases(device, "cuda")
        hopper = HOPPER_CASES if torch.cuda.get_device_capability() == HOPPER else ()
        chosen |= {f"{name}, CUDA C++": compiled[name] for name in (*CUDA_CASES, *hopper)}
    elif device == "cuda":
        print(f"without backend 'cuda': {reason}")
    wrong = []
    for name, case in chosen.items():
        if not all(bool(t.isfinite().all()) for t in case()):
            wrong.append(name)
    print(f"not finite: {', '.join(wrong)}" if wrong else "every case is finite")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
