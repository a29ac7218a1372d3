"""The state of a codebook, and how training moves it: moving averages, k-means, dead codes.

The functions take the inner ``_codebook`` module, this file's or upstream's own, and rely on nothing but its buffers
and options. Buffers change in place. Rows are (H, N, D), one head for each codebook, without gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.compat.vector_quantize_pytorch import _processes
from lamkernels.compat.vector_quantize_pytorch._upstream import load
from lamkernels.functional import code_statistics, nearest_code

Weight = Tensor | Callable[[Tensor, Tensor], Any] | None

_logger = logging.getLogger(__name__)


class Codebook(nn.Module):
    """The buffers and options of upstream's inner module, under its names.

    State: initted () bool; cluster_size (H, K) and embed_avg (H, K, D), the moving averages; embed (H, K, D), a
    parameter where it is learned.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int,
        *,
        kmeans_init: bool,
        kmeans_iters: int,
        sync_kmeans: bool,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        sync_codebook: bool | None,
        learnable_codebook: bool,
        sample_codebook_temp: float,
        ema_update: bool,
        manual_ema_update: bool,
        use_cosine_sim: bool,
    ) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.kmeans_iters, self.sync_kmeans = kmeans_iters, sync_kmeans
        self.decay, self.eps = decay, eps
        self.threshold_ema_dead_code = self.reset_cluster_size = threshold_ema_dead_code
        self.has_dead_code_replacement = threshold_ema_dead_code > 0
        self.use_ddp = _processes.world_size() > 1 if sync_codebook is None else sync_codebook
        self.sync_with_later_group = sync_codebook is None  # a process group may be made after the module
        if self.use_ddp and num_codebooks > 1 and kmeans_init:
            raise AssertionError("kmeans init is not compatible with multiple codebooks across processes")
        self.learnable_codebook, self.sample_codebook_temp = learnable_codebook, sample_codebook_temp
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.use_cosine_sim = use_cosine_sim
        self.affine_param, self.vq_bridge = False, None

        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            if use_cosine_sim:
                embed = unit(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    def transform_input(self, x: Tensor) -> Tensor:
        """x, normalised for the cosine."""
        return unit(x) if self.use_cosine_sim else x

    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """K-means on the rows of ``data`` (H, N, D), unless it was done."""
        if not self.initted:
            initialise(self, data, mask)

    def update_ema(self) -> None:
        """The codes from their moving averages."""
        codes_from_averages(self)

    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:
        """Replaces dead codes by rows of ``batch_samples`` (H, ..., D)."""
        if self.training:
            replace_dead_codes(self, batch_samples.flatten(1, -2), seq_mask)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's own forward on this state, which returns an N×K matrix: for the options without a fused form."""
        return self._upstream().forward(*args, **kwargs)

    def update_indices(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's own update on this state; that of the outer module is fused."""
        self._upstream().update_indices(*args, **kwargs)

    def _upstream(self) -> Any:
        package = load("Codebook", "vector_quantize_pytorch")
        module = package.Codebook.__new__(package.Codebook)
        shared = self.use_ddp and self.sync_kmeans
        sample = package.sample_vectors_distributed if shared else package.batched_sample_vectors
        reduce = torch.distributed.all_reduce
        functions = {
            "gumbel_sample": partial(package.gumbel_sample, stochastic=False, straight_through=False),
            "sample_fn": sample,
            "replace_sample_fn": sample,
            "kmeans_all_reduce_fn": reduce if shared else package.noop,
            "all_reduce_fn": reduce if self.use_ddp else package.noop,
        }
        object.__setattr__(module, "__dict__", self.__dict__ | functions)
        return module


def unit(x: Tensor) -> Tensor:
    """Rows of the length 1; upstream's clamp of the norm at 1e-6, not the functions' 1e-12."""
    return F.normalize(x, dim=-1, eps=1e-6)


@torch.no_grad()
def update(
    codebook: Any,
    counts: Tensor,
    sums: Tensor,
    rows: Callable[[], tuple[Tensor, Tensor | None]],
    *,
    weight: Weight = None,
    accumulate: bool = False,
    ema_update: bool | None = None,
) -> None:
    """One step of the averages, the codes and the dead codes.

    Args:
        codebook: the inner module; in training mode its dead codes are replaced.
        counts: (H, K) int64, of one batch.
        sums: (H, K, D).
        rows: gives the rows (H, N, D) and their mask (H, N) that replace dead codes; called where they may be needed.
        weight: scales the step of each code, (K,) or (H, K), or a function of (sums, counts) that returns that.
        accumulate: only keep the statistics, in ``.grad`` of the averages, for a later step.
        ema_update: overrides the codebook's own.
    """
    ema_update = codebook.ema_update if ema_update is None else ema_update
    if not ema_update and not codebook.has_dead_code_replacement:
        return
    if synchronises(codebook):
        counts, sums = _processes.reduce_statistics(counts, sums)
    counts = counts.to(sums.dtype)
    if callable(weight):
        weight = weight(sums, counts)
    for average, new in ((codebook.cluster_size, counts), (codebook.embed_avg, sums)):
        if accumulate:
            # the averages are no parameters: their .grad is upstream's place for statistics that wait
            average.grad = new.to(average, copy=True) if average.grad is None else average.grad.add_(new)
        else:
            _step(average, new, codebook.decay, weight)
    if accumulate:
        return
    if ema_update and not codebook.manual_ema_update:
        codes_from_averages(codebook)
    if codebook.has_dead_code_replacement and codebook.training:
        replace_dead_codes(codebook, *rows())


def _step(average: Tensor, new: Tensor, decay: float, weight: Any) -> None:
    new = new.to(average)
    if average.grad is not None:
        new = new + average.grad
        average.grad = None
    step: Any = 1.0 - decay
    if weight is not None:
        weight = torch.as_tensor(weight, device=average.device, dtype=average.dtype)
        weight = weight[None] if weight.ndim == 1 else weight
        step = step * weight.reshape(*weight.shape, *(1,) * (average.ndim - weight.ndim))
    average.lerp_(new, step)


@torch.no_grad()
def codes_from_averages(codebook: Any) -> None:
    """e = M / ((N + ε) / (ΣN + Kε) · ΣN), normalised for the cosine."""
    size = codebook.cluster_size
    total = size.sum(-1, keepdim=True)
    smoothed = (size + codebook.eps) / (total + codebook.codebook_size * codebook.eps) * total
    if codebook.use_cosine_sim:
        codebook.embed.data.copy_(unit(codebook.embed_avg / smoothed[..., None]))
    else:
        torch.div(codebook.embed_avg, smoothed[..., None], out=codebook.embed.data)


@torch.no_grad()
def initialise(codebook: Any, rows: Tensor, mask: Tensor | None) -> None:
    """Lloyd's k-means from rows drawn at random. As upstream, a code without a row starts at zero."""
    shared, size = _synchronises_draws(codebook), codebook.codebook_size
    rows = rows.float()
    heads = [head[_valid(head, None if mask is None else mask[i])] for i, head in enumerate(rows)]
    for head in heads:
        if head.shape[0] < size:
            _logger.warning("k-means of %d codes starts from %d rows: some are drawn twice", size, head.shape[0])
    means = [_processes.sample_rows(head, size, shared) for head in heads]
    for i, head in enumerate(heads):
        codes, counts = means[i], None
        for _ in range(codebook.kmeans_iters):
            indices = nearest_code(head, codes, metric="dot" if codebook.use_cosine_sim else "l2")
            counts, sums = code_statistics(head, indices, size)
            if shared:
                counts, sums = _processes.reduce_statistics(counts, sums)
            moved = sums / counts.clamp(min=1)[:, None]
            codes = torch.where((counts > 0)[:, None], unit(moved) if codebook.use_cosine_sim else moved, codes)
        if counts is None:
            raise ValueError(f"kmeans_iters is {codebook.kmeans_iters}; k-means needs at least 1")
        codebook.embed_avg[i].copy_(codes * counts[:, None])
        codebook.cluster_size[i].copy_(counts)
    codes_from_averages(codebook)
    codebook.initted.fill_(True)


@torch.no_grad()
def replace_dead_codes(codebook: Any, rows: Tensor, mask: Tensor | None) -> None:
    """Codes with a moving count under the threshold become distinct rows, drawn at random, as far as there are rows.

    On the CPU, and across processes, the draws are those of upstream in one process. Elsewhere they are made without
    asking the device how many codes are dead, and differ.
    """
    if not codebook.has_dead_code_replacement:
        return
    dead = codebook.cluster_size < codebook.threshold_ema_dead_code
    shared = _synchronises_draws(codebook)
    if not shared and (not rows.is_cpu or torch.compiler.is_compiling()):
        _replace_without_asking(codebook, dead, rows, mask)
        return
    if not dead.any():
        return
    rows = unit(rows) if codebook.use_cosine_sim else rows
    for head, samples in enumerate(rows):
        samples = samples[_valid(samples, None if mask is None else mask[head])]
        places = dead[head].nonzero()[:, 0]
        available = _processes.total(samples.shape[0], rows.device, shared)
        if available == 0:
            continue
        if len(places) > available:
            places = places[_processes.draw(len(places), rows.device, shared)[:available]].sort().values
        drawn = _processes.sample_rows(samples, len(places), shared).to(codebook.embed)
        codebook.embed.data[head, places] = drawn
        codebook.cluster_size[head, places] = float(codebook.reset_cluster_size)
        codebook.embed_avg[head, places] = (drawn * codebook.reset_cluster_size).to(codebook.embed_avg)


def _replace_without_asking(codebook: Any, dead: Tensor, rows: Tensor, mask: Tensor | None) -> None:
    heads, count = rows.shape[:2]
    if count == 0:
        return
    valid = rows.isfinite().all(-1) if mask is None else rows.isfinite().all(-1) & mask
    order = (torch.rand(heads, count, device=rows.device) + ~valid).argsort(-1)  # the valid rows first, shuffled
    shuffled = torch.rand(dead.shape, device=rows.device) + ~dead
    rank = shuffled.argsort(-1).argsort(-1)  # the place of each dead code among the dead ones
    dead = dead & (rank < valid.sum(-1, keepdim=True))
    source = order.gather(1, rank.clamp(max=count - 1))
    drawn = rows.gather(1, source[..., None].expand(-1, -1, rows.shape[-1])).to(codebook.embed)
    drawn = unit(drawn) if codebook.use_cosine_sim else drawn
    size = codebook.reset_cluster_size
    codebook.embed.data.copy_(torch.where(dead[..., None], drawn, codebook.embed))
    codebook.embed_avg.copy_(torch.where(dead[..., None], (drawn * size).to(codebook.embed_avg), codebook.embed_avg))
    codebook.cluster_size.masked_fill_(dead, size)


def _valid(rows: Tensor, mask: Tensor | None) -> Tensor:
    finite = rows.isfinite().all(-1)
    return finite if mask is None else finite & mask


def synchronises(codebook: Any) -> bool:
    """Whether the statistics of all processes are summed."""
    wanted = codebook.use_ddp or codebook.__dict__.get("sync_with_later_group", False)
    return wanted and _processes.world_size() > 1


def _synchronises_draws(codebook: Any) -> bool:
    options = codebook.__dict__
    if "sync_kmeans" in options:
        return bool(options["sync_kmeans"]) and synchronises(codebook)
    sampler = getattr(options["sample_fn"], "__name__", "")  # what upstream keeps of sync_kmeans
    return sampler == "sample_vectors_distributed" and synchronises(codebook)
