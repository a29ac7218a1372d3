"""The contestants. Each prepares a workload once and returns a function that runs it on buffer i.

A peer is used as its authors would: indices built beforehand, outputs preallocated, and where it has several ways to do
the same, the fastest of them on this machine. Its module is imported only where it runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import lamkernels
from lamkernels.backend import available_backends, resolve

from . import covariances, gpu_peers
from .check import DECAY, EPS
from .workloads import DTYPES, Inputs, Workload

LONG = 0.1  # seconds of a call that is not repeated to be told from others

Run = Callable[[int], dict[str, Any]]
Prepare = Callable[[Workload, Inputs], Run]
Nearest = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One implementation beside others.

    Attributes:
        name: what ``--providers`` calls it.
        kind: "ours", "baseline" (the specification of this package, which is not built for speed), "peer", or "floor":
            only what the workload itself asks of every provider.
        prepare: by op. The function it returns gives, by name, those outputs that the provider computes.
        package: the distribution that pip installs, and whose version is reported.
        module: the module that has to be there.
        devices: where it runs.
        dtypes: what it takes.
        score_matrices: how many N×K matrices of fp32 it holds at a time; it is not started where they do not fit.
        blocked: ops in which it holds blocks of such a matrix alone.
        few_rows: the relative error of its covariances where there are few rows to a column (docs/numerics.md).
        refuses: why it does not take a workload, or "".
    """

    name: str
    kind: Literal["ours", "baseline", "peer", "floor"]
    prepare: Mapping[str, Prepare]
    package: str
    module: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = DTYPES
    score_matrices: float = 0.0
    blocked: tuple[str, ...] = ()
    few_rows: float = 0.0
    refuses: Callable[[Workload], str] = lambda workload: ""

    def absent(self, device: str) -> str:
        """Why it cannot run here, or ""."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed; pip install {self.package}"
        if self.kind in ("ours", "baseline"):
            backend = self.name.partition("-")[0]
            status = available_backends()[backend]
            if not status.available:
                return status.reason
            try:
                resolve(backend, device)
            except ValueError:
                return f"runs on {status.reason} only"
        return "" if device in self.devices else f"runs on {', '.join(self.devices)} only"

    def score_bytes(self, workload: Workload) -> float:
        """Of the N×K matrices that it holds."""
        return 0 if workload.op in self.blocked else self.score_matrices * workload.score_matrix_bytes

    def version(self) -> str:
        """The installed version of its package, or ""."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""


# lamkernels, one provider per backend


def _lookup(backend: Any, precision: Any) -> Prepare:
    def nearest_code(_: Workload, inputs: Inputs) -> Run:
        codebook = inputs.codebook
        return lambda i: {
            "indices": lamkernels.nearest_code(inputs.x[i], codebook, precision=precision, backend=backend)
        }

    return nearest_code


def _ours(backend: Any) -> dict[str, Prepare]:

    def vector_quantize(_: Workload, inputs: Inputs) -> Run:
        def run(i: int) -> dict[str, Any]:
            out = lamkernels.vector_quantize(inputs.x[i], inputs.codebook, backend=backend)
            return {
                "quantized": out.quantized,
                "indices": out.indices,
                "loss": out.commitment_loss,
                "counts": out.counts,
                "sums": out.sums,
            }

        return run

    def train_step(workload: Workload, inputs: Inputs) -> Run:
        device, dtype = inputs.codebook.device, inputs.codebook.dtype
        module = lamkernels.VectorQuantize(
            workload.D, workload.K, decay=DECAY, eps=EPS, backend=backend, device=device, dtype=dtype
        )
        with torch.no_grad():
            module.codebook.copy_(inputs.codebook)
            module.code_sums.copy_(inputs.codebook)
        return _step(module, inputs, lambda: module.codebook)

    def code_statistics(workload: Workload, inputs: Inputs) -> Run:
        def run(i: int) -> dict[str, Any]:
            counts, sums = lamkernels.code_statistics(inputs.x[i], inputs.indices[i], workload.K, backend=backend)
            return {"counts": counts, "sums": sums}

        return run

    return {
        "nearest_code": _lookup(backend, "default"),
        "vector_quantize": vector_quantize,
        "train_step": train_step,
        "code_statistics": code_statistics,
        "covariance": covariances.ours(backend),
    }


def _not_in_cuda(workload: Workload) -> str:
    """Why backend "cuda" does not take a workload, in the words of its error, or ""."""
    from lamkernels.ops.covariance import cuda as covariance
    from lamkernels.ops.nearest_code import cuda as lookup
    from lamkernels.ops.vector_quantize import cuda as quantise

    device = "cuda" if torch.cuda.is_available() else "meta"
    x, codes = (torch.empty((1, 1, workload.D), dtype=getattr(torch, workload.dtype), device=device) for _ in range(2))
    if workload.op == "covariance":
        return covariance.unfit(x, None, "default")
    x, codes = x.expand(1, workload.N, -1), codes.expand(1, workload.K, -1)
    return (lookup if workload.op == "nearest_code" else quantise).unfit(x, codes, "l2")


def _step(module: Callable[[Tensor], Any], inputs: Inputs, codebook: Callable[[], Tensor]) -> Run:
    """One training step of a module that returns (quantized, indices, loss) and updates its codebook by itself."""
    leaves = [x.detach().requires_grad_() for x in inputs.x]

    def run(i: int) -> dict[str, Any]:
        x = leaves[i]
        x.grad = None
        quantized, indices, loss = module(x)
        (quantized.square().mean() + loss.sum()).backward()
        return {"quantized": quantized, "indices": indices, "loss": loss, "grad_x": x.grad, "codebook": codebook()}

    return run


def _harness(_: Workload, inputs: Inputs) -> Run:
    """The training step of a module that does nothing: its loss and backward alone, which every provider pays."""
    nothing = inputs.codebook.new_zeros(())
    step = _step(lambda x: (x, None, nothing), inputs, lambda: inputs.codebook)

    def run(i: int) -> dict[str, Any]:
        step(i)
        return {}

    return run


# torch, eager and compiled: block-wise products and argmin, as a competent user would write it


def _row_scores(x: Tensor, codebook: Tensor, norms: Tensor) -> Tensor:
    return torch.addmm(norms, x, codebook.t(), alpha=-2)  # [n, K]


def _argmin_of_rows(x: Tensor, codebook: Tensor, norms: Tensor) -> Tensor:
    return _row_scores(x, codebook, norms).argmin(1)


def _min_of_rows(x: Tensor, codebook: Tensor, norms: Tensor) -> Tensor:
    return _row_scores(x, codebook, norms).min(1).indices


def _min_of_columns(x: Tensor, codebook: Tensor, norms: Tensor) -> Tensor:
    return torch.addmm(norms[:, None], codebook, x.t(), alpha=-2).min(0).indices  # scores [K, n]


def _in_blocks(lookup: Callable[..., Tensor], scores_per_block: int) -> Nearest:
    def nearest(x: Tensor, codebook: Tensor) -> Tensor:
        codes = codebook.float()
        norms = codes.square().sum(1)
        rows = max(256, scores_per_block // codes.shape[0])
        if x.shape[0] <= rows:
            return lookup(x.float(), codes, norms)
        indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
        for start in range(0, x.shape[0], rows):
            # copied, not concatenated at the end: results that stay alive between the blocks of scores keep glibc from
            # using their memory again, and the process grows to N×K
            indices[start : start + rows] = lookup(x[start : start + rows].float(), codes, norms)
        return indices

    return nearest


def _pick_nearest(inputs: Inputs, *, compiled: bool) -> Nearest:
    """The fastest of a few layouts and block sizes on these inputs."""
    x, codebook = inputs.x[0], inputs.codebook
    if x.is_cuda and x.dtype != torch.float32:
        torch.backends.cuda.matmul.allow_tf32 = True  # holds products of fp16 and bf16 values exactly
    blocks = (2**26, 2**23) if x.is_cuda else (2**20, 2**18)
    lookups: list[Callable[..., Tensor]] = [_argmin_of_rows, _min_of_columns]
    if compiled and x.is_cuda:  # the fastest of them not compiled: a compiler takes seconds for each
        pairs = [(lookup, block) for lookup in lookups for block in blocks]
        lookup, block = _fastest(pairs, inputs, lambda pair: _in_blocks(*pair)(x, codebook))
        return _in_blocks(torch.compile(lookup, dynamic=False), block)
    if compiled:
        lookups = [torch.compile(lookup, dynamic=False) for lookup in lookups]
    else:
        lookups.append(_min_of_rows)
    variants = [_in_blocks(lookup, block) for lookup in lookups for block in blocks]
    nearest: Nearest = _fastest(variants, inputs, lambda variant: variant(x, codebook))
    return nearest


def _fastest(variants: Sequence[Any], inputs: Inputs, call: Callable[[Any], object]) -> Any:
    if not inputs.tune or len(variants) == 1:
        return variants[0]

    def seconds(variant: Any) -> float:
        times = []
        for _ in range(4):  # the first one compiles and warms up
            start = time.perf_counter()
            call(variant)
            if inputs.codebook.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            if len(times) > 1 and times[-1] > LONG:
                break
        return min(times[1:])

    return min(variants, key=seconds)


def _ste_forward(x: Tensor, codebook: Tensor, nearest: Nearest) -> tuple[Tensor, ...]:
    """(quantized, indices, loss, counts, sums) of the EMA bottleneck in plain torch."""
    with torch.no_grad():
        quantized, indices, _, counts, sums = _torch_forward(x, codebook, nearest)
    return x + (quantized - x).detach(), indices, functional.mse_loss(x, quantized), counts, sums


def _ema_update(counts: Tensor, sums: Tensor, code_sums: Tensor, cluster_size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The new codebook, code_sums and cluster_size.

    Two decisions are for the compiler's sake (torch 2.13, CPU). In place, the compiled backward would gather its codes
    from the updated codebook; and in one graph with the forward, the update read the sums before all threads had
    added to them. The check before timing caught both.
    """
    cluster_size = cluster_size.lerp(counts.to(cluster_size.dtype), 1 - DECAY)
    code_sums = code_sums.lerp(sums, 1 - DECAY)
    total = cluster_size.sum()
    smoothed = (cluster_size + EPS) * total / (total + cluster_size.shape[0] * EPS)
    return code_sums / smoothed[:, None], code_sums, cluster_size


def _torch_forward(x: Tensor, codebook: Tensor, nearest: Nearest) -> tuple[Tensor, ...]:
    indices = nearest(x, codebook)
    quantized = codebook[indices]
    counts, sums = _torch_statistics(x, indices, codebook.shape[0])
    return quantized, indices, functional.mse_loss(x.float(), quantized.float()), counts, sums


def _torch_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(num_codes, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, indices, torch.ones_like(indices))
    sums = torch.zeros(num_codes, x.shape[1], device=x.device)
    return counts, sums.index_add(0, indices, x.float())


def _one_hot_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    one_hot = functional.one_hot(indices, num_codes).float()
    return one_hot.sum(0).long(), one_hot.t() @ x.float()


def _torch(*, compiled: bool) -> dict[str, Prepare]:
    def maybe_compile(function: Any) -> Any:
        return torch.compile(function, dynamic=False) if compiled else function

    def nearest_code(_: Workload, inputs: Inputs) -> Run:
        nearest = _pick_nearest(inputs, compiled=compiled)
        return lambda i: {"indices": nearest(inputs.x[i], inputs.codebook)}

    def nearest_inside(inputs: Inputs) -> Nearest:
        # one graph for the compiler, which fuses around the whole matrix of scores
        return _in_blocks(_argmin_of_rows, 2**62) if compiled else _pick_nearest(inputs, compiled=False)

    def vector_quantize(_: Workload, inputs: Inputs) -> Run:
        forward, nearest = maybe_compile(_torch_forward), nearest_inside(inputs)

        def run(i: int) -> dict[str, Any]:
            with torch.no_grad():
                quantized, indices, loss, counts, sums = forward(inputs.x[i], inputs.codebook, nearest)
            return {"quantized": quantized, "indices": indices, "loss": loss, "counts": counts, "sums": sums}

        return run

    def train_step(_: Workload, inputs: Inputs) -> Run:
        forward, update = maybe_compile(_ste_forward), maybe_compile(_ema_update)
        nearest = nearest_inside(inputs)
        buffers = [inputs.codebook, inputs.codebook, inputs.codebook.new_ones(inputs.codebook.shape[0])]

        def module(x: Tensor) -> tuple[Tensor, ...]:
            quantized, indices, loss, counts, sums = forward(x, buffers[0], nearest)
            buffers[:] = update(counts, sums, *buffers[1:])
            return quantized, indices, loss

        return _step(module, inputs, lambda: buffers[0])

    def code_statistics(workload: Workload, inputs: Inputs) -> Run:
        variants = [maybe_compile(_torch_statistics)]
        if workload.N * workload.K <= 2**24:
            variants.append(maybe_compile(_one_hot_statistics))
        function = _fastest(variants, inputs, lambda f: f(inputs.x[0], inputs.indices[0], workload.K))

        def run(i: int) -> dict[str, Any]:
            counts, sums = function(inputs.x[i], inputs.indices[i], workload.K)
            return {"counts": counts, "sums": sums}

        return run

    return {
        "nearest_code": nearest_code,
        "vector_quantize": vector_quantize,
        "train_step": train_step,
        "code_statistics": code_statistics,
    }


def _cdist(_: Workload, inputs: Inputs) -> Run:
    return lambda i: {"indices": torch.cdist(inputs.x[i], inputs.codebook).argmin(1)}


# vector-quantize-pytorch


def _vqp_module(workload: Workload, inputs: Inputs) -> Any:
    from vector_quantize_pytorch import VectorQuantize

    module = VectorQuantize(
        dim=workload.D, codebook_size=workload.K, decay=DECAY, eps=EPS, commitment_weight=1.0, rotation_trick=False
    ).to(inputs.codebook.device)
    with torch.no_grad():
        module._codebook.embed.copy_(inputs.codebook[None])
        module._codebook.embed_avg.copy_(inputs.codebook[None])
    return module.train()


def _vqp(*, compiled: bool) -> dict[str, Prepare]:
    def vector_quantize(workload: Workload, inputs: Inputs) -> Run:  # does less: its counts and sums stay inside
        module = _vqp_module(workload, inputs)
        forward = torch.compile(module) if compiled else module

        def run(i: int) -> dict[str, Any]:
            with torch.no_grad():
                quantized, indices, loss = forward(inputs.x[i][None], freeze_codebook=True)
            return {"quantized": quantized, "indices": indices, "loss": loss}

        return run

    def train_step(workload: Workload, inputs: Inputs) -> Run:
        module = _vqp_module(workload, inputs)
        forward = torch.compile(module) if compiled else module
        return _step(lambda x: forward(x[None]), inputs, lambda: module._codebook.embed[0])

    return {"vector_quantize": vector_quantize, "train_step": train_step}


# CPU libraries of k-means and search


def _faiss(_: Workload, inputs: Inputs) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its SWIG types warn while they are imported
        import faiss

    faiss.omp_set_num_threads(inputs.threads)
    rows, codes = [x.numpy() for x in inputs.x], inputs.codebook.numpy()
    index = faiss.IndexFlatL2(codes.shape[1])
    index.add(codes)
    distances = [np.empty((len(x), 1), np.float32) for x in rows]
    labels = [np.empty((len(x), 1), np.int64) for x in rows]

    def search(i: int) -> dict[str, Any]:
        index.search(rows[i], 1, D=distances[i], I=labels[i])
        return {"indices": labels[i]}

    def knn(i: int) -> dict[str, Any]:
        return {"indices": faiss.knn(rows[i], codes, 1)[1]}

    run: Run = _fastest([search, knn], inputs, lambda variant: variant(0))
    return run


def _sklearn(workload: Workload, inputs: Inputs) -> Run:
    """The E step of its Lloyd iteration, which stays in fp32; its public argmin functions compute in fp64."""
    import sklearn
    from sklearn.cluster import KMeans

    rows, codes = [x.numpy() for x in inputs.x], inputs.codebook.numpy()
    sklearn.set_config(assume_finite=True)
    model = KMeans(workload.K, init=codes, n_init=1, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged: the fit only sets the estimator up
        model.fit(codes)
    model.cluster_centers_ = codes
    variants: list[Run] = [lambda i: {"indices": model.predict(rows[i])}]
    try:
        from sklearn.cluster._kmeans import _labels_inertia_threadpool_limit as lloyd_labels
    except ImportError:  # a private name; predict calls it after some validation
        pass
    else:
        weights = [np.ones(len(x), np.float32) for x in rows]

        def labels(i: int) -> dict[str, Any]:
            found = lloyd_labels(rows[i], weights[i], codes, n_threads=inputs.threads, return_inertia=False)
            return {"indices": found}

        variants.append(labels)
    run: Run = _fastest(variants, inputs, lambda variant: variant(0))
    return run


def _onedal(workload: Workload, inputs: Inputs) -> Run:
    import daal4py  # type: ignore[import-untyped]

    daal4py.daalinit(inputs.threads)
    rows, codes = [x.numpy() for x in inputs.x], inputs.codebook.numpy()
    kmeans = [  # one each: it keeps the number of rows of its first call
        daal4py.kmeans(nClusters=workload.K, maxIterations=0, assignFlag=True, fptype="float") for _ in rows
    ]
    return lambda i: {"indices": kmeans[i].compute(rows[i], codes).assignments}


CPU, GPU, FP32 = ("cpu",), ("cuda",), ("float32",)
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("numba", "ours", _ours("numba"), "numba", "numba"),
        Provider("numba-exact", "ours", {"nearest_code": _lookup("numba", "exact")}, "numba", "numba"),
        Provider("numba-batches", "ours", {"covariance": covariances.streamed("numba")}, "numba", "numba"),
        Provider("triton", "ours", _ours("triton"), "triton", "triton"),
        Provider(
            "cuda",
            "ours",
            _ours("cuda"),
            f"cupy-cuda{(torch.version.cuda or '13').partition('.')[0]}x",
            "cupy",
            GPU,
            refuses=_not_in_cuda,
            few_rows=2.0**-17,
        ),
        Provider("reference", "baseline", _ours("reference"), "lamkernels", "lamkernels"),
        Provider("harness", "floor", {"train_step": _harness}, "torch", "torch"),
        Provider("eager", "peer", _torch(compiled=False) | {"covariance": covariances.eager}, "torch", "torch"),
        Provider("cdist", "peer", {"nearest_code": _cdist}, "torch", "torch", dtypes=FP32, score_matrices=2),
        Provider(
            "compile", "peer", _torch(compiled=True), "torch", "torch", score_matrices=2, blocked=("nearest_code",)
        ),
        Provider(
            "vqp",
            "peer",
            _vqp(compiled=False),
            "vector-quantize-pytorch",
            "vector_quantize_pytorch",
            dtypes=FP32,
            score_matrices=5,
        ),
        Provider(
            "vqp-compile",
            "peer",
            _vqp(compiled=True),
            "vector-quantize-pytorch",
            "vector_quantize_pytorch",
            dtypes=FP32,
            score_matrices=5,
        ),
        Provider("flash-kmeans", "peer", {"nearest_code": gpu_peers.flash_kmeans}, "flash-kmeans", "flash_kmeans", GPU),
        Provider(
            "flashlib",
            "peer",
            {"nearest_code": gpu_peers.flashlib_assign, "covariance": gpu_peers.flashlib_covariance},
            "flashlib",
            "flashlib",
            GPU,
        ),
        Provider("faiss", "peer", {"nearest_code": _faiss}, "faiss-cpu", "faiss", CPU, FP32),
        Provider("sklearn", "peer", {"nearest_code": _sklearn}, "scikit-learn", "sklearn", CPU, FP32),
        Provider("deeptime", "peer", {"covariance": covariances.deeptime}, "deeptime", "deeptime", CPU, FP32),
        Provider("onedal", "peer", {"nearest_code": _onedal}, "scikit-learn-intelex", "daal4py", CPU, FP32),
    )
}
