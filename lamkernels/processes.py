"""The processes that share a command's work, and what those of a training run agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATIENCE = timedelta(days=30)  # of processes that are done for the others: torchrun ends them when one of these fails


def world_size(group: ProcessGroup | None = None) -> int:
    """How many processes the group has; 1 without an initialised group, and for a process that is not in it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return max(1, distributed.get_world_size(group))


class Processes:
    """A group of processes, looked up at each use: it may be made after the module, and copies of a module share it."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> Processes:
        return self

    @property
    def size(self) -> int:
        """How many there are."""
        return world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return distributed.get_rank(self.group) if self.size > 1 else 0

    def sums(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the processes, the same bits on all of them, by one all_reduce; of one process, the parts.

        All parts travel in one buffer of fp64: integers below 2**53 stay exact, and what fp32 sums lose is less than
        their own rounding.

        Args:
            parts: tensors of one device, by name; of equal names, order and shapes on all processes.

        Returns:
            The sums, fp64, by the same names.
        """
        if self.size == 1:
            return dict(parts)
        buffer = torch.cat([part.reshape(-1).double() for part in parts.values()])
        distributed.all_reduce(buffer, group=self.group)
        pieces = torch.split(buffer, [part.numel() for part in parts.values()])
        return {name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces, strict=True)}

    def total(self, x: Tensor) -> Tensor:
        """The sum of the processes' x, of one shape, with a gradient to all of them; of one process x."""
        total: Tensor = x if self.size == 1 else _Total.apply(x, self)  # type: ignore[no-untyped-call]
        return total

    def joined(self, x: Tensor) -> Tensor:
        """The processes' x (B, ...), of one shape, in the order of the ranks, (W·B, ...), with a gradient to all."""
        joined: Tensor = x if self.size == 1 else _Joined.apply(x, self)  # type: ignore[no-untyped-call]
        return joined


class _Total(torch.autograd.Function):
    """What a rank's loss owes another rank's x flows back to it: the gradients are summed as the values are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return _sum(x, processes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.processes), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes, ctx.rows = processes, len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes.size)]
        distributed.all_gather(parts, x.contiguous(), group=processes.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = slice(ctx.processes.rank * ctx.rows, (ctx.processes.rank + 1) * ctx.rows)
        return _sum(grad, ctx.processes)[own], None


def _sum(x: Tensor, processes: Processes) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=processes.group)
    return total


@contextlib.contextmanager
def process_group(backend: str = "gloo") -> Iterator[None]:
    """The processes of torchrun, where it started this one; ``backend`` as torch names it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()
