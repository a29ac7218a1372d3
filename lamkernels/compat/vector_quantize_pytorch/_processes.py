"""Statistics and random draws that all processes of a group agree on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Processes in the default group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def reduce_statistics(counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """counts (..., K) and sums (..., K, D) over all processes, in one all_reduce."""
    joined = torch.cat([counts[..., None].to(sums.dtype), sums], -1)
    distributed.all_reduce(joined)
    return joined[..., 0].to(counts.dtype), joined[..., 1:]


def total(count: int, device: torch.device, shared: bool) -> int:
    """The sum of a number over all processes, or over this one."""
    return sum(_counts(count, device)) if shared else count


def draw(count: int, device: torch.device, shared: bool) -> Tensor:
    """A random permutation, the same on all processes."""
    order = torch.randperm(count, device=device)
    if shared:
        distributed.broadcast(order, src=0)
    return order


def sample_rows(rows: Tensor, number: int, shared: bool) -> Tensor:
    """Rows (number, D) drawn from rows (N, D), those of all processes one after another where they are shared.

    They are distinct where there are enough. The first process draws, as one process would from the joined rows.
    """
    counts = _counts(rows.shape[0], rows.device) if shared else [rows.shape[0]]
    available = sum(counts)
    if available >= number:
        chosen = torch.randperm(available, device=rows.device)[:number]
    else:
        chosen = torch.randint(0, available, (number,), device=rows.device)
    if not shared:
        return rows[chosen]
    distributed.broadcast(chosen, src=0)
    local = chosen - sum(counts[: distributed.get_rank()])
    here = (local >= 0) & (local < rows.shape[0])
    drawn = rows.new_zeros(number, rows.shape[-1])
    drawn[here] = rows[local[here]]
    distributed.all_reduce(drawn)
    return drawn


def _counts(count: int, device: torch.device) -> list[int]:
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[distributed.get_rank()] = count
    distributed.all_reduce(counts)
    return [int(value) for value in counts.tolist()]


class _Sum(torch.autograd.Function):
    """Over processes; so is its gradient, because each process's loss depends on every process's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, differentiable."""
    summed: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return summed / world_size()
