"""``VectorQuantize``: the VQ bottleneck as a module."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamkernels.eager import is_plain
from lamkernels.functional import OneCall, code_statistics, nearest_code, numba_one_call, plan_one_call, vector_quantize
from lamkernels.nn.indices import module_indices
from lamkernels.ops.cosine import unit_rows
from lamkernels.validation import (
    BACKENDS,
    GRADIENTS,
    METRICS,
    PRECISIONS,
    Backend,
    Gradient,
    Metric,
    Precision,
    check_integer,
    check_number,
    check_option,
    check_weight,
)


class VectorQuantize(nn.Module):
    """A vector-quantisation bottleneck: ``quantized, indices, loss = vq(x)``.

    The codebook is learned either by exponential moving averages of the rows that chose each code (van den Oord et al.
    2017, appendix A.1) or by the gradient of the codebook loss. In training mode each forward, after the lookup:

    - initialises the codebook by k-means on the first batch, with ``init="kmeans"``;
    - updates the moving averages in place, with ``update="ema"`` and ``ema_update="forward"``:
      N ← γN + (1−γ)n, M ← γM + (1−γ)Σx, e = M / ((N + ε) / (ΣN + Kε) · ΣN); a batch with no row in changes nothing;
    - replaces the codes whose ``cluster_size`` fell below ``dead_code_threshold`` by rows of the batch drawn at random.

    None of this allocates an N×K matrix or rebinds a buffer, and but for the k-means, once, nothing waits for the GPU.
    The backward needs ``quantized`` as it was: write to a copy of it, not to itself.

    Args:
        dim: D, the size of a row.
        codebook_size: K, the number of codes.
        update: "ema", or "gradient": ``codebook`` is a parameter.
        decay: γ of the moving averages.
        eps: ε of their Laplace smoothing.
        ema_update: "forward", or "manual": call :meth:`update_codebook` yourself, once a step (activation checkpointing
            runs a forward twice, gradient accumulation many times).
        init: "uniform", U(±1/K), or "kmeans", on the first training batch.
        kmeans_iters: Lloyd iterations of that.
        dead_code_threshold: codes with a smaller moving count are replaced; 0 never replaces.
        commitment_weight: weight of the commitment loss in ``loss``.
        codebook_weight: weight of the codebook loss in ``loss``, for ``update="gradient"``.
        gradient: "ste", "rotation", "noise" or "none", as for :func:`lamkernels.vector_quantize`; in evaluation mode
            "noise" returns the codes.
        metric: "l2", "cosine" or "dot", as for :func:`lamkernels.nearest_code`.
        precision: as for :func:`lamkernels.nearest_code`.
        backend: as for :func:`lamkernels.nearest_code`.
        device: of the codebook.
        dtype: of the codebook, float32 or float64.

    Shape:
        x (..., D) -> quantized (..., D) in the dtype of x, indices (...,) int64, loss () fp32. A row that is not finite
        is quantised to NaN and gets index 0 (−1 would trip the assertions of an embedding or a cross entropy); a
        masked row is quantised to 0 and gets index −1.

    State:
        codebook (K, D), cluster_size (K,), code_sums (K, D), initialized () bool. ``cluster_size`` and ``code_sums``
        are the moving averages N and M; with ``update="gradient"`` cluster_size serves the dead-code rule only and
        code_sums is absent.

    Raises:
        ValueError: an argument is out of its range, named in the message; or the module was cast to half precision,
            which the averages cannot bear, and trains.
        NotImplementedError: a forward in training, under a process group of more than one process, that would let the
            codebooks of the processes drift apart: EMA, dead codes, k-means.
    """

    codebook: Tensor
    cluster_size: Tensor
    code_sums: Tensor
    initialized: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        update: Literal["ema", "gradient"] = "ema",
        decay: float = 0.8,
        eps: float = 1e-5,
        ema_update: Literal["forward", "manual"] = "forward",
        init: Literal["uniform", "kmeans"] = "uniform",
        kmeans_iters: int = 10,
        dead_code_threshold: float = 0.0,
        commitment_weight: float = 1.0,
        codebook_weight: float = 1.0,
        gradient: Gradient = "ste",
        metric: Metric = "l2",
        precision: Precision = "default",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, option, allowed in (
            ("update", update, ("ema", "gradient")),
            ("ema_update", ema_update, ("forward", "manual")),
            ("init", init, ("uniform", "kmeans")),
            ("gradient", gradient, GRADIENTS),
            ("metric", metric, METRICS),
            ("precision", precision, PRECISIONS),
            ("backend", backend, BACKENDS),
        ):
            check_option(name, option, allowed)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; it must be float32 or float64")
        for name, size in (("dim", dim), ("codebook_size", codebook_size), ("kmeans_iters", kmeans_iters)):
            check_integer(name, size)
        check_number("decay", decay, lambda value: 0 <= value <= 1, "in [0, 1]")
        check_number("eps", eps, lambda value: 0 < value < math.inf, "positive and finite")
        for name, value in (
            ("dead_code_threshold", dead_code_threshold),
            ("commitment_weight", commitment_weight),
            ("codebook_weight", codebook_weight),
        ):
            check_weight(name, value)
        self.dim, self.codebook_size = dim, codebook_size
        self.update, self.decay, self.eps, self.ema_update = update, decay, eps, ema_update
        self.init, self.kmeans_iters, self.dead_code_threshold = init, kmeans_iters, dead_code_threshold
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.gradient, self.metric, self.precision, self.backend = gradient, metric, precision, backend

        codebook = torch.empty(codebook_size, dim, device=device, dtype=dtype)
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("code_sums", torch.empty_like(codebook))
        self.register_buffer("cluster_size", torch.empty(codebook_size, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.tensor(init == "uniform", device=device))
        self._needs_init = init == "kmeans"  # the host's copy of ~initialized: a forward asks nothing of the GPU
        self.register_load_state_dict_post_hook(_read_initialized)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the codebook from U(±1/K) and starts the averages at one row a code."""
        self.codebook.uniform_(-1.0 / self.codebook_size, 1.0 / self.codebook_size)
        self._restart_averages()
        self.initialized.fill_(self.init == "uniform")
        self._needs_init = self.init == "kmeans"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises x (..., D); ``mask`` (...,) bool is False for rows to leave out, which are quantised to zero."""
        learning = self.training and self.ema_update == "forward"
        one_call = self._plan_one_call(x) if learning and mask is None else None
        if one_call is not None:
            return self._step_in_one_call(x, one_call)
        if self.training:
            self._check_training(learning)
            if self._needs_init:
                self._initialize(x, mask)
        gradient = "ste" if self.gradient == "noise" and not self.training else self.gradient
        out = vector_quantize(
            x,
            self.codebook if self.update == "gradient" else self.codebook.detach(),
            mask=mask,
            gradient=gradient,
            metric=self.metric,
            precision=self.precision,
            backend=self.backend,
        )
        loss = out.commitment_loss if self.commitment_weight == 1 else self.commitment_weight * out.commitment_loss
        if self.update == "gradient":
            loss = torch.add(loss, out.codebook_loss, alpha=self.codebook_weight)
        if learning:
            self.update_codebook(out.counts, out.sums, x, mask)
        return out.quantized, module_indices(out.indices, mask), loss

    def _check_training(self, learning: bool) -> None:
        if self.update == "ema" and self.codebook.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the codebook is {self.codebook.dtype}; moving averages need float32 or float64")
        drifts = learning and (self.update == "ema" or self.dead_code_threshold > 0)
        if (drifts or self._needs_init) and _world_size() > 1:
            raise NotImplementedError(
                "VectorQuantize does not synchronise its averages, dead codes and k-means between processes yet; use "
                "update='gradient', init='uniform' and dead_code_threshold=0, or ema_update='manual' with statistics "
                "that you reduce"
            )

    def _plan_one_call(self, x: Tensor) -> Any:
        """A plan for the lookup and the update as one compiled call; None where the averages need something else."""
        if self._needs_init or self.update != "ema" or self.metric != "l2" or self.gradient != "ste":
            return None
        codebook, sizes, code_sums = averages = self._averages()
        if (
            _world_size() > 1
            or not is_plain(*averages)
            or not sizes.is_contiguous()
            or not code_sums.is_contiguous()
            or sizes.shape != codebook.shape[:1]
            or code_sums.shape != codebook.shape
            or not codebook.dtype == sizes.dtype == code_sums.dtype
        ):
            return None
        return plan_one_call(x, codebook, "ste", "l2", self.precision, self.backend, (self.decay, self.eps))

    def _step_in_one_call(self, x: Tensor, one_call: OneCall) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = numba_one_call().train_step(x, *self._averages(), *one_call)
        if self.dead_code_threshold > 0:
            self._replace_dead_codes(x, None)
        return quantized, indices, loss if self.commitment_weight == 1 else self.commitment_weight * loss

    def _averages(self) -> tuple[Tensor, Tensor, Tensor]:
        buffers = self._buffers  # an attribute of a module takes its time
        return buffers["codebook"], buffers["cluster_size"], buffers["code_sums"]  # type: ignore[return-value]

    def code_statistics(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`update_codebook` takes, from a forward's x (..., D) and indices (...,).

        Returns:
            counts (K,) int64 and sums (K, D); of normalised rows with ``metric="cosine"``. Those of several batches, or
            of several processes, may be added.
        """
        return code_statistics(self._normalize(x.detach()), indices, self.codebook_size, backend=self.backend)

    @torch.no_grad()
    def update_codebook(
        self, counts: Tensor, sums: Tensor, x: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """One in-place update of the averages and, with rows x (..., D) to draw from, of the dead codes.

        Args:
            counts: (K,) int64, as :meth:`code_statistics` and :func:`lamkernels.vector_quantize` return.
            sums: (K, D).
            x: (..., D): the rows that replace dead codes; None replaces none.
            mask: (...,) bool: False for rows of x that must not be drawn.
        """
        weight = torch.where(counts.sum() > 0, 1 - self.decay, 0.0).to(self.cluster_size)  # no row, no change
        if self.update == "ema":
            self.cluster_size.lerp_(counts.to(self.cluster_size), weight)
            self.code_sums.lerp_(sums.to(self.code_sums), weight)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.eps) * (total / (total + self.codebook_size * self.eps))
            torch.div(self.code_sums, smoothed[:, None], out=self.codebook)
        elif self.dead_code_threshold > 0:
            self.cluster_size.lerp_(counts.to(self.cluster_size), weight)
        if self.dead_code_threshold > 0 and x is not None:
            self._replace_dead_codes(x, mask)

    @torch.no_grad()
    def _replace_dead_codes(self, x: Tensor, mask: Tensor | None) -> None:
        rows = x.reshape(-1, self.dim)
        if rows.shape[0] == 0:
            return
        drawn = torch.randint(rows.shape[0], (self.codebook_size,), device=x.device)
        dead = self.cluster_size < self.dead_code_threshold
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not dead.any():
            return  # asking costs nothing here
        candidates = self._normalize(rows[drawn].to(self.codebook))
        dead = dead & candidates.isfinite().all(-1)
        if mask is not None:
            dead &= mask.reshape(-1)[drawn]
        # torch.where and copy_, not a boolean index: the number of dead codes stays on the device
        self.codebook.copy_(torch.where(dead[:, None], candidates, self.codebook))
        self.cluster_size.masked_fill_(dead, self.dead_code_threshold)
        if self.update == "ema":
            self.code_sums.copy_(torch.where(dead[:, None], candidates * self.dead_code_threshold, self.code_sums))

    @torch.no_grad()
    def _initialize(self, x: Tensor, mask: Tensor | None) -> None:
        """Lloyd's k-means on the rows of the first batch, from rows drawn at random."""
        rows = x.detach().reshape(-1, self.dim)
        keep = rows.isfinite().all(-1)
        if mask is not None:
            keep &= mask.reshape(-1)
        rows = self._normalize(rows[keep].to(self.codebook))  # once per training run, so this may ask the GPU
        if rows.shape[0] == 0:
            return
        order = torch.randperm(rows.shape[0], device=rows.device)
        codes = rows[order[torch.arange(self.codebook_size, device=rows.device) % rows.shape[0]]]
        for _ in range(self.kmeans_iters):
            indices = nearest_code(rows, codes, metric=self.metric, precision=self.precision, backend=self.backend)
            counts, sums = code_statistics(rows, indices, self.codebook_size, backend=self.backend)
            codes = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], codes).to(rows)
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

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, update={self.update!r}, metric={self.metric!r}"


def _read_initialized(module: nn.Module, _incompatible: Any) -> None:
    assert isinstance(module, VectorQuantize)
    if not module.initialized.is_meta:
        module._needs_init = not bool(module.initialized)


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
