"""``VectorQuantize``: the VQ bottleneck as a module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lamkernels.eager import is_plain
from lamkernels.functional import quantize_with_loss, vector_quantize
from lamkernels.nn.health import CodebookHealth
from lamkernels.nn.indices import module_indices
from lamkernels.nn.learned_codebook import LearnedCodebook, read_initialized
from lamkernels.one_call import OneCall, gpu_kernels, numba_one_call, plan_one_call
from lamkernels.ops.vector_quantize.gpu_step import ema_step
from lamkernels.processes import Processes
from lamkernels.processes import world_size as _world_size
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

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class VectorQuantize(LearnedCodebook):
    """A vector-quantisation bottleneck: ``quantized, indices, loss = vq(x)``.

    The codebook is learned either by exponential moving averages of the rows that chose each code (van den Oord et al.
    2017, appendix A.1) or by the gradient of the codebook loss. In training mode each forward, after the lookup:

    - initialises the codebook by k-means on the first batch, with ``init="kmeans"``;
    - updates the moving averages in place, with ``update="ema"`` and ``ema_update="forward"``:
      N ← γN + (1−γ)n, M ← γM + (1−γ)Σx, e = M / ((N + ε) / (ΣN + Kε) · ΣN); a batch with no row in changes nothing;
    - replaces the codes whose ``cluster_size`` fell below ``dead_code_threshold`` by rows of the batch drawn at random.

    Under ``torch.distributed`` the batch is that of all processes, the state is the same on all of them, and a training
    step makes one all_reduce (docs/distributed.md); evaluation makes none.

    None of this allocates an N×K matrix or rebinds a buffer, and but for the k-means, once, nothing waits for the GPU.
    The backward needs ``quantized`` and ``indices`` as they were: write to copies of them.

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
        process_group: the processes that train the codebook together; None means all, once there are some. Of a device
            mesh, ``mesh.get_group(...)``.
        health: counts usage, perplexity, dead codes and replacements of each update, at the price of the path for small
            steps on the CPU; None counts nothing.
        device: of the codebook.
        dtype: of the codebook, float32 or float64.

    Shape:
        x (..., D) -> quantized (..., D) in the dtype of x, indices (...,) int64, loss () fp32. A row that is not finite
        is quantised to NaN and gets index 0 (−1 would trip the assertions of an embedding or a cross entropy); a
        masked row is quantised to 0 and gets index −1.

    State:
        codebook (K, D), cluster_size (K,), code_sums (K, D), initialized () bool, draws () int64: how often rows were
        drawn for dead codes, which says which rows are next. ``cluster_size`` and ``code_sums``
        are the moving averages N and M; with ``update="gradient"`` cluster_size serves the dead-code rule only and
        code_sums is absent.

    Raises:
        ValueError: an argument is out of its range, named in the message; or the module was cast to half precision,
            which the averages cannot bear, and trains.
        NotImplementedError: a forward that would change a codebook of ``update="gradient"``, by k-means or dead codes,
            while FSDP has it gathered: what it wrote would be lost.
    """

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
        process_group: ProcessGroup | None = None,
        health: CodebookHealth | None = None,
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
        if health is not None and health.codebook_size != codebook_size:
            raise ValueError(
                f"health is for {health.codebook_size} codes; it must be for codebook_size={codebook_size}"
            )
        self.dim, self.codebook_size = dim, codebook_size
        self.update, self.decay, self.eps, self.ema_update = update, decay, eps, ema_update
        self.init, self.kmeans_iters, self.dead_code_threshold = init, kmeans_iters, dead_code_threshold
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.gradient, self.metric, self.precision, self.backend = gradient, metric, precision, backend
        self.health, self._processes, self._sharded = health, Processes(process_group), False

        codebook = torch.empty(codebook_size, dim, device=device, dtype=dtype)
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("code_sums", torch.empty_like(codebook))
        self.register_buffer("cluster_size", torch.empty(codebook_size, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.tensor(init == "uniform", device=device))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=device))
        self._needs_init = init == "kmeans"  # the host's copy of ~initialized: a forward asks nothing of the GPU
        self.register_load_state_dict_post_hook(read_initialized)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the codebook from U(±1/K) and starts the averages at one row a code."""
        self.codebook.uniform_(-1.0 / self.codebook_size, 1.0 / self.codebook_size)
        self._restart_averages()
        self.draws.zero_()
        self.initialized.fill_(self.init == "uniform")
        self._needs_init = self.init == "kmeans"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises x (..., D); ``mask`` (...,) bool is False for rows to leave out, which are quantised to zero."""
        counting = self.update == "ema" or self.dead_code_threshold > 0 or self.health is not None
        learning = counting and self.training and self.ema_update == "forward"
        one_call = self._plan_one_call(x) if learning and mask is None and self.health is None else None
        if one_call is not None:
            return self._step_in_one_call(x, one_call)
        kernels = self._gpu_kernels(x) if learning and mask is None and self.health is None else None
        if kernels is not None:
            return self._step_on_gpu(x, kernels)
        if self.training:
            self._check_training(learning)
            if self._needs_init:
                self._initialize(x, mask)
        options: dict[str, Any] = {
            "gradient": "ste" if self.gradient == "noise" and not self.training else self.gradient,
            "metric": self.metric,
            "precision": self.precision,
            "backend": self.backend,
        }
        if self.update == "gradient" and not learning and mask is None and options["gradient"] != "noise":
            return quantize_with_loss(x, self.codebook, self.commitment_weight, self.codebook_weight, **options)
        codebook = self.codebook if self.update == "gradient" else self.codebook.detach()
        out = vector_quantize(x, codebook, mask=mask, **options)
        loss = out.commitment_loss if self.commitment_weight == 1 else self.commitment_weight * out.commitment_loss
        if self.update == "gradient":
            loss = torch.add(loss, out.codebook_loss, alpha=self.codebook_weight)
        if learning:
            self.update_codebook(out.counts, out.sums, x, mask)
        return out.quantized, module_indices(out.indices, mask), loss

    def _check_training(self, learning: bool) -> None:
        if self.update == "ema" and self.codebook.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the codebook is {self.codebook.dtype}; moving averages need float32 or float64")
        rewrites = self._needs_init or (learning and self.dead_code_threshold > 0)
        if self._sharded and rewrites:
            raise NotImplementedError(
                "VectorQuantize cannot rewrite a sharded codebook in a forward; initialise it before fully_shard, and "
                "replace dead codes with ema_update='manual' and update_codebook after the optimiser's step"
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

    def _gpu_kernels(self, x: Tensor) -> Any:
        """Those that update the averages in the launches of the lookup; None where they need something else."""
        if not x.is_cuda or self._needs_init or self.update != "ema" or self.metric != "l2" or self.gradient != "ste":
            return None
        return gpu_kernels(x, *self._averages(), backend=self.backend) if _world_size() == 1 else None

    def _step_on_gpu(self, x: Tensor, kernels: Any) -> tuple[Tensor, Tensor, Tensor]:
        rates = self.decay, self.eps
        quantized, indices, loss = ema_step(kernels, x, self._averages(), self.precision, rates, self.commitment_weight)
        if self.dead_code_threshold > 0:
            self._replace_dead_codes(x, None)
        return quantized, indices, loss

    def _averages(self) -> tuple[Tensor, Tensor, Tensor]:
        buffers = self._buffers  # an attribute of a module takes its time
        return buffers["codebook"], buffers["cluster_size"], buffers["code_sums"]  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, update={self.update!r}, metric={self.metric!r}"
