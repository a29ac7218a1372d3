"""Steps of drop-in modules: quantisation with the counters and averages that an upstream module keeps beside it.

Each is one call where a small call can go past the dispatcher (:mod:`lamkernels.one_call`), and elsewhere the same in
torch operators on :func:`lamkernels.functional.vector_quantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lamkernels.backend import resolve
from lamkernels.eager import is_plain
from lamkernels.functional import lookup, nearest_code, vector_quantize
from lamkernels.one_call import numba_steps, plan_one_call


def noise_step(
    last: Tensor, first: Tensor, codebook: Tensor, noise: Tensor, used: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise substitution (NSVQ) of last − first, as :func:`lamkernels.functional.vector_quantize` does it.

    Args:
        last: (N, D).
        first: (N, D) in its dtype.
        codebook: (K, D).
        noise: (N, D).
        used: (K,) int32; 1 is added for each code that a row has chosen.

    Returns:
        quantized (N, D), indices (N,) int64, 0 for a row that is not finite, and the perplexity () of the codes.
    """
    planned, others = None, (first, noise, used)
    fits = first.shape == last.shape == noise.shape and first.dtype == last.dtype == noise.dtype == codebook.dtype
    if fits and first.is_contiguous() and noise.is_contiguous() and _counts(used, codebook, torch.int32):
        planned = plan_one_call(last, codebook, "noise", "l2", "default", "auto", others=others)
    if planned is not None and planned.rows is None:
        step: tuple[Tensor, Tensor, Tensor] = numba_steps().noise_step(last, codebook, first, planned.plan, noise, used)
        return step
    x = last - first
    if x.dtype != codebook.dtype:  # under autocast: the difference is rounded, and quantised in the dtype of the codes
        x = x.to(codebook.dtype)
    out = vector_quantize(x, codebook, gradient="noise", noise=noise)
    return out.quantized, out.indices.clamp(min=0), _measure_use(out.counts, x.shape[0], used)


def code_step(x: Tensor, codebook: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`noise_step` returns, with the codes themselves as ``quantized``: only the codebook learns by them.

    Args:
        x: (N, D).
        codebook: (K, D).
        used: (K,) int32; 1 is added for each code that a row has chosen.
    """
    out = vector_quantize(x.detach().to(codebook.dtype), codebook.detach(), gradient="none")
    return lookup(out.indices, codebook), out.indices.clamp(min=0), _measure_use(out.counts, len(x), used)


def _measure_use(counts: Tensor, rows: int, used: Tensor) -> Tensor:
    """Adds the codes that ``counts`` (K,) has to ``used`` (K,), and returns the perplexity ()."""
    used.add_(counts > 0)
    perplexity: Tensor = torch.special.entr(counts / rows).sum().exp()
    return perplexity


def gradient_step(x: Tensor, codebook: Tensor, usage: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through quantisation by codes that are returned with their gradient: the losses are the caller's.

    Args:
        x: (..., D).
        codebook: (K, D).
        usage: (K,) in the dtype of the codebook, or None; 1 is added for each row of the first axis of x in which a
            code is chosen.

    Returns:
        x + (codes − x).detach(), codes (..., D), indices (...,) int64: 0, and the code of 0, for a row that is not
        finite.
    """
    planned = None
    others = () if usage is None else (usage,)
    if x.dtype == codebook.dtype and (usage is None or _counts(usage, codebook, codebook.dtype)):
        planned = plan_one_call(x, codebook, "ste", "l2", "default", "auto", others=others)
    if planned is not None:
        step: tuple[Tensor, Tensor, Tensor] = numba_steps().gradient_step(x, codebook, *planned, usage)
        return step
    indices = nearest_code(x, codebook).clamp_(min=0)
    codes = F.embedding(indices, codebook)
    if usage is not None:
        count_groups(indices, usage)
    return x + (codes - x).detach(), codes, indices


def count_groups(indices: Tensor, usage: Tensor) -> None:
    """Adds 1 to ``usage`` (K,) of a code for each row of the first axis of ``indices`` (B, ...) that has it."""
    rows = indices.reshape(len(indices) if indices.ndim else 1, -1)
    usage += usage.new_zeros(rows.shape[0], usage.shape[0]).scatter_(1, rows, 1.0).sum(0)


def map_step(
    x: Tensor, codebook: Tensor, averages: tuple[Tensor, Tensor] | None, rates: tuple[float, float], commitment: float,
    places: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:  # fmt: skip
    """LAPO's step (:mod:`lamkernels.compat.lapo`) on contiguous maps, with ``quantized`` in the layout of x.

    Args:
        x: b · H · D · ``places`` entries.
        codebook: (H, K, D) in the dtype of x; updated.
        averages: of counts (H, K) and of sums (H, K, D), updated; None in evaluation.
        rates: decay and ε of the update.
        commitment: weight of the loss.
        places: h · w of a map.

    Returns:
        quantized as x, loss (), perplexity () and indices (H, b, places) int64, 0 for a vector that is not finite; None
        where this takes more than one call.
    """
    books, num_codes, dim = codebook.shape
    tensors = (x, codebook, *(averages or ()))
    if not is_plain(*tensors) or any(t.dtype != x.dtype or not t.is_contiguous() for t in tensors):
        return None
    if resolve("auto", "cpu") != "numba" or codebook.requires_grad or places < 1:
        return None
    steps, batch = numba_steps(), x.numel() // (books * dim * places)
    plan = steps.plan_of_maps((batch, books, dim, places), x.dtype, num_codes, rates)
    return None if plan is None else steps.map_step(x, codebook, averages, plan, commitment)


def _counts(counter: Tensor, codebook: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can add to a plain tensor."""
    return (
        counter.dtype == dtype
        and counter.shape == codebook.shape[:1]
        and counter.is_contiguous()
        and not counter.requires_grad
    )
