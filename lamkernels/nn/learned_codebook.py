"""The upkeep of a codebook that is learned: initialisation, moving averages, dead codes, in one process or many."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamkernels.functional import code_statistics, nearest_code
from lamkernels.nn.dead_codes import Candidates, believed, own_candidates, uniform
from lamkernels.nn.health import CodebookHealth
from lamkernels.nn.kmeans import kmeans
from lamkernels.one_call import gpu_upkeep, rows_in_groups
from lamkernels.ops.cosine import unit_rows
from lamkernels.processes import Processes
from lamkernels.validation import Backend, Metric, Precision

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LearnedCodebook(nn.Module):
    """What :class:`lamkernels.VectorQuantize` does with its state between two lookups; it describes the options."""

    codebook: Tensor
    cluster_size: Tensor
    code_sums: Tensor
    initialized: Tensor
    draws: Tensor  # () int64: in how many updates rows were drawn for dead codes; the same on all processes
    _needs_init: bool
    _sharded: bool
    _processes: Processes
    dim: int
    codebook_size: int
    update: str
    decay: float
    eps: float
    kmeans_iters: int
    dead_code_threshold: float
    metric: Metric
    precision: Precision
    backend: Backend
    health: CodebookHealth | None

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that train the codebook together; None means all."""
        return self._processes.group

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "codebook" and hasattr(value, "placements"):  # FSDP shards a parameter, and gathers it in a forward
            self._sharded = True
        super().__setattr__(name, value)

    def code_statistics(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`update_codebook` takes, from a forward's x (..., D) and indices (...,).

        Returns:
            counts (K,) int64 and sums (K, D); of normalised rows with ``metric="cosine"``. Those of several batches of
            a process may be added; update_codebook adds those of the processes.
        """
        return code_statistics(self._normalize(x.detach()), indices, self.codebook_size, backend=self.backend)

    @torch.no_grad()
    def update_codebook(
        self, counts: Tensor, sums: Tensor, x: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """One in-place update of the averages and, with rows x (..., D) to draw from, of the dead codes.

        Under ``torch.distributed`` this is the one all_reduce of a step: every process must come here, with x or
        without, be its batch empty or not.

        Args:
            counts: (K,) int64, as :meth:`code_statistics` and :func:`lamkernels.vector_quantize` return.
            sums: (K, D).
            x: (..., D): the rows that replace dead codes; None replaces none.
            mask: (...,) bool: False for rows of x that must not be drawn.
        """
        ema, rows = self.update == "ema", x if self.dead_code_threshold > 0 else None
        candidates = None
        if self._processes.size > 1 and (ema or self.dead_code_threshold > 0 or self.health is not None):
            counts, sums, candidates = self._over_processes(counts, sums, rows, mask)
        if ema:
            self._move_averages(counts, sums)
        elif self.dead_code_threshold > 0:
            self.cluster_size.lerp_(counts.to(self.cluster_size), self._share(counts))
        replaced = None if rows is None else self._replace_dead_codes(rows, mask, candidates)
        if self.health is not None:
            self.health.feed(counts, replaced, self._processes)

    def _move_averages(self, counts: Tensor, sums: Tensor) -> None:
        state = self.codebook, self.cluster_size, self.code_sums
        upkeep = gpu_upkeep(*state, sums, backend=self.backend)
        if upkeep is not None and self.codebook_size <= upkeep.MAX_CODES:
            upkeep.moving_averages(counts.contiguous(), sums, *state, 1 - self.decay, self.eps)
            torch.autograd.graph.increment_version(state)
            return
        share = self._share(counts)
        self.cluster_size.lerp_(counts.to(self.cluster_size), share)
        self.code_sums.lerp_(sums.to(self.code_sums), share)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) * (total / (total + self.codebook_size * self.eps))
        torch.div(self.code_sums, smoothed[:, None], out=self.codebook)

    def _share(self, counts: Tensor) -> Tensor:
        """1 − γ; 0 for a batch with no row in, which changes nothing."""
        return counts.sum(dtype=self.cluster_size.dtype).clamp_(max=1 - self.decay)

    def _over_processes(
        self, counts: Tensor, sums: Tensor, x: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Candidates | None]:
        """The statistics of all processes and, with x, rows of theirs to draw from: one all_reduce."""
        parts = {"counts": counts}
        if self.update == "ema":
            parts["sums"] = sums
        if x is not None:
            self.draws.add_(1)
            size = x.numel() // self.dim
            here = torch.arange(self._processes.size, device=counts.device) == self._processes.rank
            parts |= {"sizes": here * size, **self._candidates(x, mask)._asdict()}
        total = self._processes.sums(parts)
        counts, sums = total["counts"].to(torch.int64), total.get("sums", sums)
        if x is None:
            return counts, sums, None
        valid = believed(*uniform(self.draws, self.codebook_size), total["sizes"].to(torch.int64))
        return counts, sums, Candidates(total["rows"].to(self.cluster_size), valid & (total["valid"] > 0))

    def _candidates(self, x: Tensor, mask: Tensor | None) -> Candidates:
        """The rows of this process that may replace codes in this step."""
        numbers, _ = uniform(self.draws, self.codebook_size)
        flat = None if mask is None else mask.reshape(-1)
        rows = x.detach().reshape(-1, self.dim)
        found, valid = own_candidates(numbers, rows, flat, self._processes.rank, self._processes.size)
        return Candidates(self._normalize(found.to(self.cluster_size)), valid)

    @torch.no_grad()
    def _replace_dead_codes(self, x: Tensor, mask: Tensor | None, drawn: Candidates | None = None) -> Tensor | None:
        """Replaces dead codes by rows drawn from all processes, or else from x; (K,) bool: which. None may be none."""
        if drawn is None:
            self.draws.add_(1)
            replaced = self._replace_on_gpu(x, mask)
            if replaced is not None:
                return replaced
        dead = self.cluster_size < self.dead_code_threshold
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not dead.any():
            return None  # asking costs nothing here
        candidates, valid = self._candidates(x, mask) if drawn is None else drawn
        dead = dead & valid
        self._write_codes(dead[:, None], candidates)
        self.cluster_size.masked_fill_(dead, self.dead_code_threshold)
        if self.update == "ema":
            self.code_sums.copy_(torch.where(dead[:, None], candidates * self.dead_code_threshold, self.code_sums))
        return dead

    def _replace_on_gpu(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Replaces dead codes in one launch; (K,) bool: which, or None where it takes something else."""
        if self.metric == "cosine" or x.numel() == 0:
            return None
        state = [self.codebook, self.cluster_size, *([self.code_sums] if self.update == "ema" else [])]
        upkeep = gpu_upkeep(*state, backend=self.backend, rows=x, mask=mask)
        if upkeep is None:
            return None
        rows, flat = rows_in_groups(x.detach().unsqueeze(0)), None if mask is None else mask.reshape(-1).contiguous()
        sums = self.code_sums if self.update == "ema" else None
        replaced: Tensor = upkeep.replace_dead_codes(
            rows, flat, self.draws, self.codebook, self.cluster_size, sums, self.dead_code_threshold
        )
        torch.autograd.graph.increment_version(state)
        return replaced

    def _write_codes(self, where: Tensor, codes: Tensor) -> None:
        """torch.where and copy_, not a boolean index: how many codes are written stays on the device."""
        if self._sharded:
            from torch.distributed.tensor import DTensor, distribute_tensor

            if isinstance(self.codebook, DTensor):  # every rank has all of the new codes, and takes its shard of them
                mesh, placements = self.codebook.device_mesh, self.codebook.placements
                where, codes = (
                    distribute_tensor(tensor.expand_as(codes).contiguous(), mesh, placements, src_data_rank=None)
                    for tensor in (where, codes)
                )
        self.codebook.copy_(torch.where(where, codes, self.codebook))

    @torch.no_grad()
    def _initialize(self, x: Tensor, mask: Tensor | None) -> None:
        """Lloyd's k-means on the rows of the first batch, of all processes."""
        if self.initialized:  # by a checkpoint that only rank 0 read, and DDP broadcast
            self._needs_init = False
            return
        rows = x.detach().reshape(-1, self.dim)
        keep = rows.isfinite().all(-1)
        if mask is not None:
            keep &= mask.reshape(-1)
        rows = self._normalize(rows[keep].to(self.codebook))  # once per training run, so this may ask the GPU
        nearest = functools.partial(nearest_code, metric=self.metric, precision=self.precision, backend=self.backend)
        codes = kmeans(rows, self.codebook_size, self.kmeans_iters, nearest, self._processes, self.backend)
        if codes is None:
            return
        self.codebook.copy_(self._normalize(codes))
        self._restart_averages()
        self.initialized.fill_(True)
        self._needs_init = False

    def _normalize(self, rows: Tensor) -> Tensor:
        """For the cosine, rows of the length 1 in the dtype of the codebook."""
        return unit_rows(rows, self.codebook.dtype) if self.metric == "cosine" else rows

    def _restart_averages(self) -> None:
        self.cluster_size.fill_(1.0)
        if self.update == "ema":
            self.code_sums.copy_(self.codebook)


def read_initialized(module: nn.Module, _incompatible: Any) -> None:
    """The hook after a checkpoint is loaded: what the host knows of it."""
    assert isinstance(module, LearnedCodebook)
    if not module.initialized.is_meta:
        module._needs_init = not bool(module.initialized)
