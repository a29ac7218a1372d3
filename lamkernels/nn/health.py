"""How much of a codebook is in use, counted on the device and read when asked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, distributed

from lamkernels.processes import Processes, world_size
from lamkernels.validation import check_integer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EXTRAS = 2  # behind the counts of the codes: codes replaced, and updates


class HealthReport(NamedTuple):
    """What :meth:`CodebookHealth.read` returns.

    Attributes:
        usage: the share of the codes that at least one row chose; 0 without rows.
        perplexity: exp(−Σ p ln p) of the shares p of the codes: K if all are equally likely, 1 if one takes all rows;
            0 without rows.
        dead_codes: how many codes no row chose.
        replaced: how often a dead code was replaced.
        rows: how many rows were counted.
        updates: how many batches they came in.
    """

    usage: float
    perplexity: float
    dead_codes: int
    replaced: int
    rows: int
    updates: int


class CodebookHealth:
    """Usage, perplexity, dead codes and replacements of a codebook, since the last reset or over the last updates.

    A ``VectorQuantize`` with ``health=CodebookHealth(K)`` feeds it in each ``update_codebook``, so in each training
    step, with the counts of the rows of all processes: every rank reads the same. To see evaluation, or the codes of
    another module, feed one with :meth:`update`. An update adds integers on the device, in place, and waits for
    nothing; a read does.

    Args:
        codebook_size: K.
        window: how many of the last updates to look at, kept as (window, K + 2) int64; None looks at all since
            the last reset.
        device: of the counts; they move to that of the first update if it is another one.

    Raises:
        TypeError: codebook_size or window is not an int.
        ValueError: it is below 1.

    Example:
        >>> vq = lk.VectorQuantize(64, 512, dead_code_threshold=0.5, health=lk.CodebookHealth(512, window=100))
        >>> ...  # train
        >>> vq.health.read().perplexity
    """

    def __init__(
        self, codebook_size: int, *, window: int | None = None, device: torch.device | str | None = None
    ) -> None:
        check_integer("codebook_size", codebook_size)
        if window is not None:
            check_integer("window", window)
        self.codebook_size, self.window = codebook_size, window
        self._total = torch.zeros(codebook_size + EXTRAS, dtype=torch.int64, device=device)
        self._recent = None if window is None else self._total.new_zeros(window, codebook_size + EXTRAS)
        self._place = self._total.new_zeros(1)  # of the oldest update in the window
        self._of_all = False  # the counts are those of all processes

    @torch.no_grad()
    def update(self, counts: Tensor, replaced: Tensor | None = None) -> None:
        """Takes the counts of a batch in.

        Args:
            counts: (K,) int64, as :func:`lamkernels.vector_quantize` and :func:`lamkernels.code_statistics` return.
            replaced: (K,) bool: the codes that were replaced after it; None means none.

        Raises:
            TypeError: counts is not an int64 tensor.
            ValueError: its shape is not (K,).
        """
        if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
            found = counts.dtype if isinstance(counts, Tensor) else f"a {type(counts).__name__}"
            raise TypeError(f"counts is {found}; it must be an int64 tensor")
        if counts.shape != (self.codebook_size,):
            raise ValueError(f"counts has shape {tuple(counts.shape)}; it must be ({self.codebook_size},)")
        if self._total.device != counts.device:
            self._total, self._place = self._total.to(counts.device), self._place.to(counts.device)
            self._recent = None if self._recent is None else self._recent.to(counts.device)
        events = counts.new_zeros(()) if replaced is None else replaced.sum()
        batch = torch.cat([counts, torch.stack([events, torch.ones_like(events)])])
        if self._recent is not None:
            self._total.sub_(self._recent.index_select(0, self._place)[0])
            self._recent.index_copy_(0, self._place, batch[None])
            self._place.add_(1).remainder_(len(self._recent))
        self._total.add_(batch)

    def read(self) -> HealthReport:
        """The report; waits for the device."""
        return self._report(self._total)

    def read_all(self, process_group: ProcessGroup | None = None) -> HealthReport:
        """The report over the rows of all processes, by one all_reduce: all of them must call it, with equal K.

        Where a module has fed the counts of all processes, it is :meth:`read`. Reading changes nothing.

        Args:
            process_group: the processes; None means all.
        """
        if self._of_all or world_size(process_group) == 1:
            return self.read()
        total = self._total.clone()
        distributed.all_reduce(total, group=process_group)
        return self._report(total)

    def reset(self) -> None:
        """Forgets all updates, without waiting for the device."""
        for tensor in (self._total, self._recent, self._place):
            if tensor is not None:
                tensor.zero_()

    def feed(self, counts: Tensor, replaced: Tensor | None, processes: Processes) -> None:
        """As :meth:`update`, of a module whose counts are those of all processes."""
        self._of_all = processes.size > 1
        self.update(counts, replaced)

    def _report(self, total: Tensor) -> HealthReport:
        *counts, replaced, updates = total.tolist()
        rows = sum(counts)
        if rows == 0:
            return HealthReport(0.0, 0.0, self.codebook_size, replaced, 0, updates)
        entropy = -sum(n / rows * math.log(n / rows) for n in counts if n)
        used = sum(n > 0 for n in counts)
        return HealthReport(
            used / self.codebook_size, math.exp(entropy), self.codebook_size - used, replaced, rows, updates
        )

    def __repr__(self) -> str:
        return f"CodebookHealth({self.codebook_size}, window={self.window})"
