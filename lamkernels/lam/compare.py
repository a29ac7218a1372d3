"""Two trainers step by step: do the runs coincide, and where do they part."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lamkernels.lam.measure import seconds
from lamkernels.lam.stock import StockVectorQuantize
from lamkernels.lam.train import Trainer
from lamkernels.nn import VectorQuantize

COINCIDE = 1e-3  # relative difference below which two losses of fp32 training count as the same curve
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


def train_in_turn(
    trainers: Mapping[str, Trainer], *, between: Callable[[], None] | None = None, progress: bool = True
) -> dict[str, list[float]]:
    """Trains all to the end, one step each in turn, the order reversed every round.

    Args:
        trainers: by name.
        between: called after every round, outside the times.
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
        if between is not None:
            between()
        if step % 50 == 49:
            bar.set_postfix({name: f"{float(t.losses['loss'][-1]):.4f}" for name, t in trainers.items()})
    return times


@torch.no_grad()
def nudge(trainer: Trainer) -> None:
    """Moves every weight of the encoder's last layer to the next number of its format."""
    weight = trainer.model.inverse_dynamics.head.weight
    weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))


class Watch:
    """Compares in every step what a bottleneck did with what the stock one does on the same rows and codes.

    Args:
        bottleneck: a :class:`lamkernels.VectorQuantize` in training.
    """

    def __init__(self, bottleneck: VectorQuantize) -> None:
        self.stock = StockVectorQuantize(
            bottleneck.dim, bottleneck.codebook_size, commitment_weight=bottleneck.commitment_weight
        )
        self.stock.to(bottleneck.codebook.device).eval()
        self._seen: tuple[Tensor, ...] | None = None
        self._other_code: list[Tensor] = []
        self._difference: list[Tensor] = []
        self._rows = 0
        self._before = bottleneck.register_forward_pre_hook(self._keep)
        self._behind = bottleneck.register_forward_hook(self._add)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, VectorQuantize)
        ready = (
            module.training and not module._needs_init
        )  # the first batch makes the codebook: no codes to compare with
        self._seen = (inputs[0].detach(), module.codebook.clone()) if ready else None

    def _add(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._seen is not None:
            self._seen += tuple(tensor.detach() for tensor in output)

    @torch.no_grad()
    def check(self) -> None:
        """Compares the last step; waits for nothing."""
        if self._seen is None:
            return
        x, codebook, quantized, indices, _ = self._seen
        self.stock.codebook.copy_(codebook)
        expected, expected_indices, _ = self.stock(x)
        same = indices == expected_indices
        self._rows += same.numel()
        self._other_code.append((~same).sum())
        difference = torch.where(same[..., None], quantized - expected, 0.0).abs().max()
        self._difference.append(difference / expected.abs().max().clamp(min=1e-30))
        self._seen = None

    def result(self) -> dict[str, float]:
        """What was compared, once the training is over.

        Returns:
            "rows", "other_code" (how many of them got another code), and "max_relative_difference" of the outputs of
            the others, relative to the largest entry.
        """
        self._before.remove()
        self._behind.remove()
        return {
            "rows": self._rows,
            "other_code": int(torch.stack(self._other_code).sum()) if self._other_code else 0,
            "max_relative_difference": float(torch.stack(self._difference).max()) if self._difference else 0.0,
        }


def curve_agreement(first: Tensor, second: Tensor) -> dict[str, Any]:
    """How far two loss curves (steps,) part.

    Returns:
        "max_relative_difference" and "median_relative_difference" of the losses, "identical_steps" (bitwise equal),
        "first_step_apart" (the first step that differs by more than 1e-3 of the loss, or None), "coincide".
    """
    difference = relative_difference(first, second)
    apart = (difference > COINCIDE).nonzero()
    return {
        "max_relative_difference": float(difference.max()),
        "median_relative_difference": float(difference.median()),
        "identical_steps": int((first == second).sum()),
        "steps": len(first),
        "tolerance": COINCIDE,
        "first_step_apart": int(apart[0]) if len(apart) else None,
        "coincide": not len(apart),
    }


def relative_difference(first: Tensor, second: Tensor) -> Tensor:
    """|first − second| / |first|, (steps,) float64."""
    return (first - second).double().abs() / first.double().abs().clamp(min=1e-12)


def within_rounding(fused: Mapping[str, Any], control: Mapping[str, Any]) -> bool:
    """Whether two curves part no further than a run parts from itself when it starts one rounding away.

    Training amplifies rounding, so two correct runs cannot be told to agree to a fixed number of digits. The control
    says how far rounding alone takes them; its largest difference is matched up to a factor of three.
    """
    key = "max_relative_difference"
    return bool(fused["coincide"] or fused[key] <= 3 * control[key])


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
