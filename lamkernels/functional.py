"""The public functions: check the arguments, bring them into the operators' layout, call the operator."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from lamkernels.backend import resolve
from lamkernels.eager import in_shape, is_plain
from lamkernels.one_call import gpu_cosine, gpu_learned, numba_one_call, plan_one_call, rows_in_groups
from lamkernels.ops.code_statistics.op import code_statistics as _code_statistics
from lamkernels.ops.cosine import unit_or_nan
from lamkernels.ops.nearest_code.op import nearest_code as _nearest_code
from lamkernels.ops.vector_quantize.gpu_step import learned_step
from lamkernels.ops.vector_quantize.op import vector_quantize as _vector_quantize
from lamkernels.validation import (
    BACKENDS,
    GRADIENTS,
    METRICS,
    PRECISIONS,
    Backend,
    Gradient,
    Metric,
    Precision,
    check_codebook,
    check_float,
    check_indices,
    check_integer,
    check_mask,
    check_option,
    check_tensors,
    refuse_tangents,
)


class VQOutput(NamedTuple):
    """What :func:`vector_quantize` returns.

    Attributes:
        quantized: (..., D) in the dtype of x: the nearest code of each row; NaN for a row that is not finite, 0 for a
            masked row.
        indices: (...,) int64: its index; −1 for a row that is not finite or is masked.
        commitment_loss: () fp32 (fp64 for fp64 x): mean((x − sg q)²) over the rows that are in.
        codebook_loss: () fp32 (fp64 for fp64 x): mean((sg x − q)²), the same value with its gradient to the codebook.
        counts: (K,) or (H, K) int64: how many rows chose each code.
        sums: (K, D) or (H, K, D) fp32 (fp64 for fp64 x): the sum of those rows. No gradient.
    """

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    counts: Tensor
    sums: Tensor


@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = ...,
    precision: Precision = ...,
    return_distance: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = ...,
    precision: Precision = ...,
    return_distance: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "l2",
    precision: Precision = "default",
    return_distance: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The index of the nearest code of each row, without the N×K distance matrix. No gradient.

    Ties go to the lowest index. A row with a NaN or an infinity gets −1, and a code with one never wins.

    Args:
        x: (..., D), or (H, ..., D) with a codebook per head; float32, float16, bfloat16 or float64, any strides.
        codebook: (K, D) or (H, K, D), in the dtype of x, or float32 with float16 and bfloat16 x.
        metric: "l2", the smallest Σ(x − c)²; "dot", the largest x·c; "cosine", the largest x·c of l2-normalised
            vectors, where the norm is clamped at 1e-12.
        precision: "default": fp32 accumulation, the regret is bounded by the numerics contract (docs/numerics.md);
            "exact": the fp64 minimum of the stored values; "fast": plain TF32 products of fp32 input where the
            hardware has them.
        return_distance: also return the score of the chosen code.
        backend: "auto", "reference", "numba", "triton" or "cuda". An explicit one never falls back.

    Returns:
        indices (...,) int64; with ``return_distance`` also the squared distance ("l2") or the product ("dot",
        "cosine") as (...,) fp32, fp64 for fp64 x, NaN where the index is −1.

    Raises:
        TypeError: x or codebook is not a tensor of a supported dtype.
        ValueError: a shape, device or option does not fit; the message names it and what is allowed.
        RuntimeError: the backend asked for cannot run here.
    """
    check_tensors(x, codebook)
    check_option("metric", metric, METRICS)
    check_option("precision", precision, PRECISIONS)
    check_option("backend", backend, BACKENDS)
    leading = x.shape[:-1]
    rows, codes, score = _canonical(x.detach(), codebook.detach(), metric, precision, backend)
    indices, distance = _nearest_code(rows, codes, score, precision, return_distance, backend)
    indices = cast(Tensor, indices.reshape(leading))
    if not return_distance:
        return indices
    if score != metric and x.dtype != torch.float64:  # an exact cosine was computed in fp64
        distance = distance.float()
    return indices, cast(Tensor, distance.reshape(leading))


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    gradient: Gradient = "ste",
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    metric: Metric = "l2",
    precision: Precision = "default",
    backend: Backend = "auto",
) -> VQOutput:
    """Vector quantisation in one fused pass: lookup, output, both losses and the statistics of the codes.

    The straight-through estimator ("ste", Bengio et al. 2013; van den Oord et al. 2017) passes the gradient of
    ``quantized`` to x unchanged. ``commitment_loss`` sends 2 (x − q) / (n·D) to x, ``codebook_loss`` sends
    −2 Σ(x − c_k) / (n·D) to code k, where n counts the rows that are in: finite and not masked. The other rows get no
    gradient. With no row in, the losses are 0.

    Args:
        x: (..., D), or (H, ..., D) with a codebook per head; float32, float16, bfloat16 or float64, any strides.
        codebook: (K, D) or (H, K, D), in the dtype of x, or float32 with float16 and bfloat16 x.
        gradient: how the gradient g of ``quantized`` goes on. "ste": to x, unchanged. "rotation" (Fifty et al. 2024):
            to x, turned and scaled back as x was onto its code, s(g − 2(g·w)w + 2(g·q̂)u) with u = x/‖x‖, q̂ = q/‖q‖,
            w = (u + q̂)/‖u + q̂‖, s = ‖q‖/‖x‖; norms are clamped at 1e-6. "noise" (NSVQ, Vali and Bäckström 2022):
            ``quantized`` is x + (r/‖v‖ + 1e-12) v with r = ‖x − q‖ and noise v, and with a = g·v/‖v‖ x gets
            g + a(x − q)/r and its code −a(x − q)/r, 0 where r or ‖v‖ is 0. "none": nowhere.
        mask: (...,) bool, False for a row to leave out; None means that all rows are in.
        noise: v for gradient="noise", in the shape of x; None draws it from N(0, 1).
        generator: to draw it from; None is torch's.
        metric: as for :func:`nearest_code`. With "cosine", ``quantized`` is the normalised code and the losses compare
            it with the normalised x.
        precision: as for :func:`nearest_code`.
        backend: as for :func:`nearest_code`.

    Returns:
        A :class:`VQOutput`.

    Raises:
        TypeError: x, codebook or mask is not a tensor of a supported dtype.
        ValueError: a shape, device or option does not fit; the message names it and what is allowed.
        RuntimeError: the backend asked for cannot run here.
    """
    check_option("gradient", gradient, GRADIENTS)
    check_option("metric", metric, METRICS)
    check_option("precision", precision, PRECISIONS)
    check_option("backend", backend, BACKENDS)
    planned = None if metric == "cosine" else plan_one_call(x, codebook, gradient, metric, precision, backend)
    if planned is None:
        check_tensors(x, codebook)
        refuse_tangents(x, codebook)
    if gradient == "noise":
        noise = _noise(x, noise, generator)
    elif noise is not None or generator is not None:
        raise ValueError(f"noise and generator are for gradient='noise'; gradient is {gradient!r}")
    if mask is not None:
        check_mask(mask, x)
    if planned is not None and is_plain(*(tensor for tensor in (mask, noise) if tensor is not None)):
        mask = None if mask is None else mask.contiguous()
        noise = None if noise is None else noise.to(x.dtype).contiguous()
        return VQOutput(*numba_one_call().quantize(x, codebook, planned.plan, (planned.rows, mask, noise)))
    leading = x.shape[:-1]
    rows, codes, score = _canonical(x, codebook, metric, precision, backend)
    flat = rows.shape[0], math.prod(rows.shape[1:-1])
    quantized, indices, commitment, codebook_loss, counts, sums, _, num_rows, _ = _vector_quantize(
        rows,
        codes,
        None if mask is None else mask.reshape(flat),
        None if noise is None else noise.to(rows.dtype).reshape(*flat, rows.shape[-1]),
        score,
        precision,
        gradient,
        backend,
    )
    if gradient == "none":
        quantized = quantized.detach()
    if codebook.ndim == 2:
        commitment, codebook_loss, counts, sums = (t.squeeze(0) for t in (commitment, codebook_loss, counts, sums))
    else:  # the mean over all rows that are in, whichever head they belong to
        weight = num_rows / num_rows.sum().clamp(min=1)
        commitment, codebook_loss = (commitment * weight).sum(), (codebook_loss * weight).sum()
    if score != metric and x.dtype != torch.float64:  # an exact cosine was computed in fp64
        commitment, codebook_loss, sums = (t.float() for t in (commitment, codebook_loss, sums))
    return VQOutput(
        in_shape(quantized, x.shape).to(x.dtype), indices.reshape(leading), commitment, codebook_loss, counts, sums
    )


def quantize_with_loss(
    x: Tensor, codebook: Tensor, commitment_weight: float, codebook_weight: float, *, metric: Metric = "l2",
    gradient: Gradient = "ste", precision: Precision = "default", backend: Backend = "auto",
    whole_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`vector_quantize` for modules that learn their codebook (K, D) by gradient and want no statistics.

    Args:
        x: (..., D).
        codebook: (K, D).
        commitment_weight: of the commitment loss in the loss.
        codebook_weight: of the codebook loss in it.
        metric: this and the rest as for :func:`vector_quantize`.
        gradient: no "noise".
        precision: as there.
        backend: as there.
        whole_rows: x may have any shape whose entries make whole rows; ``quantized`` gets it too.

    Returns:
        quantized, indices (...,), or (N,) with ``whole_rows``, with 0 for a row that is not finite, and the loss ().
    """
    numbers, weights = (int, float), (commitment_weight, codebook_weight)
    plain = metric != "cosine" and isinstance(commitment_weight, numbers) and isinstance(codebook_weight, numbers)
    planned = plan_one_call(x, codebook, gradient, metric, precision, backend, None, whole_rows) if plain else None
    if planned is not None:
        quantized, indices, loss = numba_one_call().weighted_step(x, codebook, *planned, weights)
        return quantized, indices.reshape(-1) if whole_rows and indices.ndim != 1 else indices, loss
    rows = x.reshape(-1, codebook.shape[1]) if whole_rows else x
    kernels = gpu_learned(rows, codebook, backend=backend) if plain and gradient == "ste" else None
    if kernels is not None:
        check_option("metric", metric, METRICS)
        check_option("precision", precision, PRECISIONS)
        quantized, indices, loss = learned_step(kernels, rows, codebook, metric, precision, weights)
        return in_shape(quantized, x.shape) if whole_rows else quantized, indices, loss
    out = vector_quantize(rows, codebook, gradient=gradient, metric=metric, precision=precision, backend=backend)
    weighted = out.commitment_loss if commitment_weight == 1 else commitment_weight * out.commitment_loss
    loss = torch.add(weighted, out.codebook_loss, alpha=codebook_weight)
    return in_shape(out.quantized, x.shape), out.indices.clamp(min=0), loss


def quantize_channels(
    x: Tensor, codebook: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize_with_loss` of vectors along the second axis: x (b, D, ...) -> quantized as x, indices (N,), loss.

    A small call on contiguous x copies nothing.
    """
    weights = commitment_weight, codebook_weight
    fits = x.is_contiguous() and x.dtype == codebook.dtype and all(isinstance(w, int | float) for w in weights)
    if fits and is_plain(x, codebook) and codebook.is_contiguous() and resolve("auto", "cpu") == "numba":
        planned = numba_one_call().plan_of_channels(x.shape, x.dtype, codebook.shape)
        if planned is not None:
            quantized, indices, loss = numba_one_call().weighted_step(x, codebook, planned, None, weights)
            return quantized, indices.reshape(-1), loss
    quantized, indices, loss = quantize_with_loss(x.movedim(1, -1), codebook, *weights, whole_rows=True)
    return quantized.movedim(-1, 1).contiguous(), indices, loss


def code_statistics(x: Tensor, indices: Tensor, num_codes: int, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """How many rows chose each code, and their sum: what an EMA or k-means update needs.

    Bitwise reproducible for a fixed shape and device. The gradient of ``sums`` goes to x.

    Args:
        x: (..., D) with D at least 1; float32, float16, bfloat16 or float64, any strides.
        indices: (...,) int64. A row whose index is outside [0, num_codes), such as −1, or that is not finite, is in no
            count and no sum.
        num_codes: K, at least 1.
        backend: as for :func:`nearest_code`.

    Returns:
        counts (K,) int64 and sums (K, D) fp32, fp64 for fp64 x.

    Raises:
        TypeError: x or indices is not a tensor of a supported dtype.
        ValueError: a shape, device or option does not fit; the message names it and what is allowed.
        RuntimeError: the backend asked for cannot run here.
    """
    check_float("x", x)
    refuse_tangents(x)
    check_indices(indices)
    check_option("backend", backend, BACKENDS)
    if x.shape[:-1] != indices.shape:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)}; for x of {tuple(x.shape)} it must be {tuple(x.shape[:-1])}"
        )
    if indices.device != x.device:
        raise ValueError(f"indices is on {indices.device} and x on {x.device}; they must be on one device")
    check_integer("num_codes", num_codes)
    if x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; its rows must have at least 1 entry")
    counts, sums = _code_statistics(rows_in_groups(x.unsqueeze(0)), indices.reshape(1, -1), num_codes, backend)
    return counts.squeeze(0), sums.squeeze(0)


def lookup(indices: Tensor, codebook: Tensor) -> Tensor:
    """Codes back to vectors: ``codebook[indices]``, NaN where the index is −1. Differentiable in the codebook.

    Args:
        indices: (...,) int64 in [−1, K); (H, ...) with a codebook per head.
        codebook: (K, D) or (H, K, D), floating point.

    Returns:
        (..., D) in the dtype of the codebook.

    Raises:
        TypeError: indices is not int64, or codebook is not a floating-point tensor.
        ValueError: the shapes or devices do not fit.
        IndexError: on the CPU, an index is below −1 or not below K. (On a GPU, and in compiled code, it trips torch's
            own assertion.)
    """
    check_float("codebook", codebook)
    check_codebook(codebook)
    check_indices(indices)
    if indices.device != codebook.device:
        raise ValueError(
            f"indices is on {indices.device} and codebook on {codebook.device}; they must be on one device"
        )
    if codebook.ndim == 3 and (indices.ndim == 0 or indices.shape[0] != codebook.shape[0]):
        raise ValueError(
            f"indices has shape {tuple(indices.shape)}; with a codebook per head its first axis must be "
            f"{codebook.shape[0]}"
        )
    num_codes, dim = codebook.shape[-2:]
    safe = indices.masked_fill(indices == -1, 0)
    try:
        if codebook.ndim == 3:
            flat = safe.reshape(codebook.shape[0], -1, 1).expand(-1, -1, dim)
            codes = codebook.gather(1, flat).reshape(*indices.shape, dim)
        else:
            codes = F.embedding(safe, codebook)
    except (IndexError, RuntimeError) as error:
        raise IndexError(f"an index is outside [-1, {num_codes - 1}]: {error}") from error
    return codes.masked_fill((indices == -1)[..., None], torch.nan)


def _noise(x: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if noise is None:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    if generator is not None:
        raise ValueError("noise and generator are both given; one of them must be None")
    check_float("noise", noise)
    if noise.shape != x.shape or noise.device != x.device:
        raise ValueError(
            f"noise is {tuple(noise.shape)} on {noise.device}; it must be {tuple(x.shape)} on {x.device}, as x is"
        )
    return noise.detach()


def _canonical(
    x: Tensor, codebook: Tensor, metric: str, precision: str, backend: Backend
) -> tuple[Tensor, Tensor, str]:  # fmt: skip
    """x (..., D) and codebook as the operators take them, (H, K, D) and for the cosine normalised.

    An exact cosine compares products of vectors that are normalised in fp64: a dot product of fp64 rows.
    """
    if metric == "cosine":
        exact = precision == "exact" or x.dtype == torch.float64
        codebook = _unit(codebook, torch.float64 if exact else torch.float32, backend)
        if exact:
            x, metric = _unit(x, torch.float64, backend), "dot"
    if codebook.ndim == 2:
        x, codebook = x.unsqueeze(0), codebook.unsqueeze(0)
    return rows_in_groups(x), codebook, metric


def _unit(vectors: Tensor, dtype: torch.dtype, backend: Backend) -> Tensor:
    """(..., D) normalised, NaN as a whole where one is not finite."""
    kernels = gpu_cosine(vectors, backend=backend)
    unit: Tensor = unit_or_nan(vectors, dtype) if kernels is None else kernels.unit_or_nan(vectors, dtype)
    return unit
