"""What is measured: shapes of latent action models and of large tokenizers, each with its byte and flop model.

Suites:

- "lam": the launch-bound sizes of latent action models, a few hundred rows and a handful of codes;
- "tokenizer": the sizes of video tokenizers and of labelling runs, bound by memory or by products;
- "targets": the sizes at which GPU libraries published their times, and the project's own targets for one;
- "moments": covariances of representations, plain and of rows one step apart;
- "memory": the peak extra memory of a forward at a size where an N×K matrix of fp32 scores is 8 GiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

CODE_OPS = ("nearest_code", "vector_quantize", "train_step", "code_statistics")
OPS = (*CODE_OPS, "covariance")
SUITES = ("lam", "tokenizer", "targets", "memory", "moments")
GPU = ("cuda",)
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Workload:
    """One operation at one size.

    Attributes:
        suite: the suite it belongs to, or "custom".
        op: "nearest_code": indices; "vector_quantize": the forward, with losses and statistics; "train_step": forward,
            ``(q.square().mean() + loss.sum()).backward()`` and the EMA update of the codebook; "code_statistics":
            counts and sums of given indices; "covariance": of x, or with K > 0 also of the rows K steps later and of
            the two.
        N: rows.
        K: codes, or the lag.
        D: the size of a row.
        dtype: of x and the codebook.
        devices: where it is run; the largest ones are for GPUs only.
        measure: "time", or "memory": the peak extra memory of one call.
    """

    suite: str
    op: str
    N: int
    K: int
    D: int
    dtype: str = "float32"
    devices: tuple[str, ...] = ("cpu", "cuda")
    measure: str = "time"

    @property
    def name(self) -> str:
        return f"{self.op} N={self.N} K={self.K} D={self.D} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of x."""
        return self.N * self.D * self.torch_dtype.itemsize

    @property
    def flops(self) -> int:
        """The operations that no exact method avoids: the products of the lookup and the sums of the statistics."""
        lookup, statistics = 2 * self.N * self.K * self.D, self.N * self.D
        if self.op == "covariance":  # half of the symmetric one, all of the other; that of the later rows is shared
            return self.N * self.D**2 * (3 if self.K else 1)
        if self.op == "nearest_code":
            return lookup
        if self.op == "code_statistics":
            return statistics
        elementwise = 3 * self.N * self.D  # the residual, its square and its sum
        if self.op == "vector_quantize":
            return lookup + statistics + elementwise
        return lookup + statistics + elementwise + 6 * self.N * self.D  # the harness and dx

    @property
    def bytes(self) -> int:
        """The traffic of a method that reads each input once and writes each output once, with int64 indices."""
        indices, codebook = 8 * self.N, self.K * self.D * self.torch_dtype.itemsize
        statistics = 8 * self.K + 4 * self.K * self.D
        if self.op == "covariance":
            return self.row_bytes + self.output_bytes
        if self.op == "nearest_code":
            return self.row_bytes + codebook + indices
        if self.op == "code_statistics":
            return self.row_bytes + indices + statistics
        forward = 2 * self.row_bytes + codebook + indices + statistics
        if self.op == "vector_quantize":
            return forward
        # the harness reads q for its mean and again for 2q/(N·D), which it writes; dx reads x, q and that gradient
        backward = 3 * self.row_bytes + 4 * self.row_bytes
        return forward + backward + 3 * statistics  # the EMA reads and writes its averages and writes the codebook

    @property
    def output_bytes(self) -> int:
        """What a forward has to return: indices, and for vector_quantize the quantised rows and the statistics."""
        indices, statistics = 8 * self.N, 8 * self.K + 4 * self.K * self.D
        if self.op == "covariance":
            return 8 * self.D**2 * (3 if self.K else 1)
        if self.op == "nearest_code":
            return indices
        return statistics if self.op == "code_statistics" else indices + self.row_bytes + statistics + 8

    @property
    def peak_bytes(self) -> int:
        """What a call holds at once at the least: inputs, outputs, and in a training step more.

        A training step also has the averages of the codebook, the gradient of the quantised rows, and that of x.
        """
        inputs = self.row_bytes
        if self.op == "code_statistics":
            inputs += 8 * self.N
        elif self.op != "covariance":
            inputs += self.K * self.D * self.torch_dtype.itemsize
        kept = 2 * self.row_bytes + 4 * self.K * self.D + 4 * self.K if self.op == "train_step" else 0
        return inputs + self.output_bytes + kept

    @property
    def score_matrix_bytes(self) -> int:
        """An N×K matrix of fp32 scores, which nothing here should need."""
        return 4 * self.N * self.K


class Inputs(NamedTuple):
    """The tensors of a workload.

    Attributes:
        x: buffers of (N, D); calls take turns through them.
        codebook: (K, D), not to be written to.
        indices: for each buffer (N,) int64 in [0, K), the input of code_statistics.
        threads: how many threads a provider may use.
        tune: a provider may try its variants on these and keep the fastest.
    """

    x: list[Tensor]
    codebook: Tensor
    indices: list[Tensor]
    threads: int
    tune: bool = True


def make_inputs(workload: Workload, device: str, *, buffers: int = 1, threads: int = 1, seed: int = 0) -> Inputs:
    """Standard normal rows and codes, the same for every provider of a device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(workload.torch_dtype)

    codebook = normal(workload.K, workload.D)
    x = [normal(workload.N, workload.D) for _ in range(buffers)]
    indices = [torch.randint(max(1, workload.K), (workload.N,), generator=generator, device=device) for _ in x]
    return Inputs(x, codebook, indices, threads)


LAM_SHAPES = ((256, 8, 32), (540, 6, 32), (256, 16, 128), (1024, 64, 16))
MOMENT_SHAPES = ((200000, 64), (50000, 512), (20000, 2048))
LOOKUP_SHAPES = ((65536, 8, 32), (65536, 64, 16), (262144, 16, 128), (65536, 1024, 64), (16384, 8192, 256))
STEP_SHAPES = ((65536, 8, 32), (65536, 64, 16), (65536, 1024, 64))
GPU_LOOKUPS = (  # the sizes at which GPU libraries published their times
    (1048576, 8, 16, "bfloat16"),
    (273000, 64, 16, "bfloat16"),
    (1048576, 64, 64, "bfloat16"),
    (1048576, 256, 128, "float16"),
    (1048576, 1024, 64, "float16"),
    (262144, 8192, 256, "bfloat16"),
    (1048576, 65536, 128, "float16"),
)

WORKLOADS: tuple[Workload, ...] = (
    *(Workload("lam", op, *shape) for op in CODE_OPS for shape in LAM_SHAPES),
    *(Workload("tokenizer", "nearest_code", *shape) for shape in LOOKUP_SHAPES),
    *(Workload("tokenizer", op, *shape) for op in CODE_OPS[1:] for shape in STEP_SHAPES),
    *(Workload("targets", "nearest_code", n, k, d, dtype, GPU) for n, k, d, dtype in GPU_LOOKUPS),
    Workload("targets", "vector_quantize", 1048576, 16, 128, devices=GPU),
    *(Workload("targets", "covariance", n, 0, d, devices=GPU) for n, d in ((1000000, 64), (5000000, 2048))),
    *(Workload("moments", "covariance", n, lag, d) for n, d in MOMENT_SHAPES for lag in (0, 1)),
    *(Workload("memory", op, 262144, 8192, 32, measure="memory") for op in ("nearest_code", "vector_quantize")),
)


def select(
    suites: Sequence[str],
    ops: Sequence[str],
    device: str,
    shapes: Sequence[tuple[int, int, int]] = (),
    dtype: str | None = None,
) -> list[Workload]:
    """The workloads of these suites and ops on a device, or of these ops at given shapes instead.

    Args:
        suites: of :data:`SUITES`. With ``shapes``, "memory" measures memory at them; the others measure time.
        ops: of :data:`OPS`.
        device: "cpu" or "cuda".
        shapes: (N, K, D) each.
        dtype: of :data:`DTYPES`, in place of the workloads' own.
    """
    chosen = [w for w in WORKLOADS if w.suite in suites and w.op in ops and device in w.devices]
    if shapes:
        measure = "memory" if tuple(suites) == ("memory",) else "time"
        chosen = [Workload("custom", op, *shape, measure=measure) for op in ops for shape in shapes]
    return [replace(w, dtype=dtype) for w in chosen] if dtype else chosen
