"""Two trainers step by step: do the runs coincide, and where do they part."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lamkernels.lam.measure import seconds
from lamkernels.lam.train import Trainer

# relative difference up to which two losses are one but for rounding, which training amplifies
COINCIDE = {torch.float32: 1e-3, torch.float64: 1e-10}
WARM_UP_STEPS = 5


@contextmanager
def reproducible() -> Iterator[None]:
    """Deterministic algorithms and no TF32 inside; the settings of before come back at the end."""
    backends = torch.backends
    before = (
        torch.are_deterministic_algorithms_enabled(),
        backends.cudnn.benchmark,
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
    )
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # a debugging aid that would be timed along
    backends.cudnn.benchmark = backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = fill
        backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before[1:]


def train_in_turn(trainers: Mapping[str, Trainer], *, progress: bool = True) -> dict[str, list[float]]:
    """Trains all to the end, one step each in turn, the order reversed every round.

    Args:
        trainers: by name.
        progress: show a progress bar.

    Returns:
        By name, the time of every step, s.
    """
    from tqdm import tqdm

    times: dict[str, list[float]] = {name: [] for name in trainers}
    steps = max(trainer.config.steps for trainer in trainers.values())
    bar = tqdm(range(steps), desc=f"training {', '.join(trainers)}", disable=not progress)
    for step in bar:
        for name in list(trainers) if step % 2 else reversed(list(trainers)):
            if trainers[name].step <= step:
                times[name].append(seconds(trainers[name].train_step, trainers[name].device))
        if step % 50 == 49:
            bar.set_postfix({name: f"{float(t.losses['loss'][-1]):.4f}" for name, t in trainers.items()})
    return times


def curve_agreement(first: Tensor, second: Tensor) -> dict[str, Any]:
    """How far two loss curves (steps,) part; the tolerance is that of their dtype in :data:`COINCIDE`.

    Returns:
        "max_relative_difference" and "median_relative_difference" of the losses, "identical_steps" (bitwise equal),
        "steps", "tolerance", "first_step_apart" (the first step that differs by more, or None), "coincide".
    """
    tolerance = COINCIDE[first.dtype]
    difference = relative_difference(first, second)
    apart = (difference > tolerance).nonzero()
    return {
        "max_relative_difference": float(difference.max()),
        "median_relative_difference": float(difference.median()),
        "identical_steps": int((first == second).sum()),
        "steps": len(first),
        "tolerance": tolerance,
        "first_step_apart": int(apart[0]) if len(apart) else None,
        "coincide": not len(apart),
    }


def relative_difference(first: Tensor, second: Tensor) -> Tensor:
    """|first − second| / |first|, (steps,) float64."""
    return (first - second).double().abs() / first.double().abs().clamp(min=1e-12)


def bottleneck_agreement(stock: nn.Module, fused: nn.Module, x: Tensor) -> dict[str, float]:
    """One training step of both bottlenecks from one state: that of ``stock``, on copies.

    Args:
        stock: a bottleneck with a codebook.
        fused: another with the same state_dict.
        x: (..., D) float.

    Returns:
        "index_agreement" (share of rows with the same code) and the largest absolute differences, relative to the
        largest absolute value of the stock one: "quantized", "loss", "grad_x", "codebook_after" (its EMA update).
    """
    results = []
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(x.shape, generator=generator).to(x)
    for module in (stock, fused):
        module = copy.deepcopy(module).train()
        module.load_state_dict(stock.state_dict())
        leaf = x.detach().clone().requires_grad_()
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(0)
            quantized, indices, loss = module(leaf)
        torch.autograd.backward([quantized, loss], [grad, torch.ones_like(loss)])
        assert leaf.grad is not None
        results.append((indices, quantized.detach(), loss.detach(), leaf.grad, module.state_dict()["codebook"]))
    (indices, *ours), (other_indices, *others) = results
    agreement = {"index_agreement": float((indices == other_indices).double().mean())}
    for name, a, b in zip(("quantized", "loss", "grad_x", "codebook_after"), ours, others, strict=True):
        agreement[name] = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
    return agreement


def step_time_ms(times: list[float]) -> dict[str, float]:
    """Median and quartiles of step times [s] behind the warm-up, ms."""
    kept = times[min(WARM_UP_STEPS, len(times) - 2) :]
    low, middle, high = statistics.quantiles(kept, n=4)
    return {"median": 1e3 * middle, "lower_quartile": 1e3 * low, "upper_quartile": 1e3 * high}
