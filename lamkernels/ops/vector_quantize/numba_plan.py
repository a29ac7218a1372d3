"""The kernel of a small call, and what all calls of one shape have in common."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.nearest_code.numba import (
    FLAGS,
    LOOKUP,
    METRICS,
    Strides,
    elements,
    lookup_parameters,
    prepare_heads,
    sizes_of,
)
from lamkernels.ops.parallel import ZERO, bits, compiled, entry
from lamkernels.ops.simd import computed_type, narrow, stored_type, widen, words
from lamkernels.ops.vector_quantize.numba import QUANTIZE, nan_and_zero, quantize_chunks, sums_by_chunk
from lamkernels.ops.vector_quantize.numba_backward import BACKWARD, BACKWARD_CHUNK, backward, pulls_in_task
from lamkernels.validation import GRADIENTS, PRECISIONS

# The parameters behind those of the quantisation: 0 and 1 where the two losses over all heads go, which may be one
# place, 2 how many rows are in, 3 the address of the scratch, to which the elements in SCRATCH are relative, 4 whether
# this call prepares and 5 whether it does the rest. For an EMA update: 6 cluster sizes (H, K) or 0, 7 code sums
# (H, K, D), 8 codebook (H, K, D), all in the computed type, 9 and 10 the bits of the decay and of ε as fp64. Then 11
# the bits of what the first loss is multiplied by, as fp64, 12 whether the EMA is LAPO's, 13 where the perplexity () of
# the codes, summed over the heads, goes or 0, 14 for each code of one head an int32 (K,) or 0: +1 where it is chosen,
# 15 such a number in the computed type or 0: +1 for each group of as many rows as 16 says in which the code is chosen
# 17 and 18: x is made first, the second of these less the first, or 0 where x is there
ONE_CALL = QUANTIZE + 19
CODEBOOK_LOSS, LOSS_WEIGHT = QUANTIZE + 1, QUANTIZE + 11
AVERAGES, LAPO_AVERAGES = QUANTIZE + 6, QUANTIZE + 12
PERPLEXITY, CALLS_USED, GROUPS_USED, SUBTRACTED = QUANTIZE + 13, QUANTIZE + 14, QUANTIZE + 15, QUANTIZE + 17
SCRATCH = (7, LOOKUP + 5, LOOKUP + 6, LOOKUP + 7, LOOKUP + 11, LOOKUP + 12, LOOKUP + 13)


@njit(**FLAGS)
def _one_call(p, stored, computed):
    a = carray(p, (ONE_CALL,))
    if a[QUANTIZE + 4] != 0:
        for place in SCRATCH:
            a[place] += a[QUANTIZE + 3]
        prepare_heads(p, computed)
        a[0] = 0
        if a[SUBTRACTED] != 0:
            _subtract(a, stored)
    if a[QUANTIZE + 5] == 0 or not quantize_chunks(p, stored, computed):
        return
    rows_in = elements(a[LOOKUP + 13], 0, a[18], np.int64(0))
    losses = elements(a[LOOKUP + 11], 0, a[18], computed)
    loss, inside = np.float64(losses[0]), rows_in[0]
    if a[18] > 1:  # the mean over all rows that are in, whichever head they belong to
        loss *= np.float64(inside)
        for head in range(1, a[18]):
            loss += np.float64(losses[head]) * np.float64(rows_in[head])
            inside += rows_in[head]
        loss /= np.float64(max(inside, 1))
    elements(a[QUANTIZE + 1], 0, 1, computed)[0] = loss
    elements(a[QUANTIZE], 0, 1, computed)[0] = loss * a.view(np.float64)[LOSS_WEIGHT]
    a[QUANTIZE + 2] = inside
    if a[PERPLEXITY] != 0 or a[CALLS_USED] != 0:
        _measure_use(a, computed)
    if a[LAPO_AVERAGES] != 0:
        for head in range(a[18]):
            _update_lapo_averages(a, head, computed)
    elif a[AVERAGES] != 0 and inside > 0:  # with no row that is in, the averages stay
        _update_averages(a, computed)
    if a[GROUPS_USED] != 0:
        _count_groups(a, computed)


@njit(**FLAGS)
def _subtract(a, stored):
    size = a[18] * a[8] * a[10]
    x, first = elements(a[2], 0, size, stored), elements(a[SUBTRACTED], 0, size, stored)
    last = elements(a[SUBTRACTED + 1], 0, size, stored)
    for i in range(size):
        x[i] = narrow(widen(last[i]) - widen(first[i]), stored)


@njit(**FLAGS)
def _measure_use(a, computed):
    rows, num_codes, total = a[8], a[9], 0.0
    for head in range(a[18]):
        counts, entropy = elements(a[LOOKUP + 8], head * num_codes, num_codes, np.int64(0)), 0.0
        for k in range(num_codes):
            if counts[k] > 0:
                share = counts[k] / rows
                entropy -= share * np.log(share)
        total += np.exp(entropy)
    if a[PERPLEXITY] != 0:
        elements(a[PERPLEXITY], 0, 1, computed)[0] = total
    if a[CALLS_USED] != 0:
        counts = elements(a[LOOKUP + 8], 0, num_codes, np.int64(0))
        used = elements(a[CALLS_USED], 0, num_codes, np.int32(0))
        for k in range(num_codes):
            used[k] += counts[k] > 0


@njit(**FLAGS)
def _count_groups(a, computed):
    """Where a row is not in, its code is the first; the room for counts keeps the group that a code was seen in."""
    num_codes, size = a[9], a[GROUPS_USED + 1]
    indices = elements(a[17], 0, a[8], np.int64(0))
    seen = elements(a[LOOKUP + 8], 0, num_codes, np.int64(0))
    used = elements(a[GROUPS_USED], 0, num_codes, computed)
    seen[:] = -1
    for group in range(a[8] // size):
        for n in range(group * size, (group + 1) * size):
            code = max(indices[n], 0)
            if seen[code] != group:
                seen[code] = group
                used[code] += 1


@njit(**FLAGS)
def _update_lapo_averages(a, head, computed):
    """As in :mod:`lamkernels.compat.lapo`: the smoothed counts are kept."""
    num_codes, size = a[9], a[9] * a[10]
    settings = a.view(np.float64)
    decay, eps = settings[QUANTIZE + 9], settings[QUANTIZE + 10]
    counts = elements(a[LOOKUP + 8], head * num_codes, num_codes, np.int64(0))
    sums = elements(a[LOOKUP + 9], head * size, size, computed)
    sizes = elements(a[AVERAGES], head * num_codes, num_codes, computed)
    averages = elements(a[AVERAGES + 1], head * size, size, computed)
    codebook = elements(a[AVERAGES + 2], head * size, size, computed)
    total = 0.0
    for k in range(num_codes):
        sizes[k] = decay * sizes[k] + (1.0 - decay) * counts[k]
        total += sizes[k]
    scale = total / (total + num_codes * eps)
    for k in range(num_codes):
        sizes[k] = (sizes[k] + eps) * scale
        inverse = 1.0 / np.float64(sizes[k])
        for d in range(k * a[10], (k + 1) * a[10]):
            averages[d] = decay * averages[d] + (1.0 - decay) * sums[d]
            codebook[d] = averages[d] * inverse


@njit(**FLAGS)
def _update_averages(a, computed):
    num_codes, dim = a[9], a[10]
    settings = a.view(np.float64)
    new, eps = 1.0 - settings[QUANTIZE + 9], settings[QUANTIZE + 10]
    counts = elements(a[LOOKUP + 8], 0, num_codes, np.int64(0))
    sums = elements(a[LOOKUP + 9], 0, num_codes * dim, computed)
    sizes = elements(a[AVERAGES], 0, num_codes, computed)
    averages = elements(a[AVERAGES + 1], 0, num_codes * dim, computed)
    codebook = elements(a[AVERAGES + 2], 0, num_codes * dim, computed)
    total = 0.0
    for k in range(num_codes):
        sizes[k] += new * (counts[k] - sizes[k])
        total += sizes[k]
    scale = (total + num_codes * eps) / total
    for k in range(num_codes):
        smoothed = scale / (sizes[k] + eps)
        for d in range(k * dim, (k + 1) * dim):
            averages[d] += new * (sums[d] - averages[d])
            codebook[d] = averages[d] * smoothed


def _step(p):
    _one_call(words(p), stored_type(p), computed_type(p))


STORED_AS = {torch.float32: (torch.float32, torch.bfloat16, torch.float16), torch.float64: (torch.float64,)}
ForwardArray, BackwardArray = ctypes.c_int64 * ONE_CALL, ctypes.c_int64 * BACKWARD


class Plan(NamedTuple):
    """What all calls of one shape have in common."""

    forward: Any  # ForwardArray without the addresses
    backward: Any  # BackwardArray without them, for a contiguous gradient and for losses without one
    all_rows: Any  # how many rows there are, as the backward reads it
    scratch: int  # bytes
    unwanted: tuple[int, ...]  # where in the scratch counts, sums, residual sums and the loss go, if nobody wants them
    tasks: int
    work: int
    kernel: Any  # the compiled forward, it as a function of an address, and so the backward
    call: Callable[[int], None]
    kernel_backward: Any
    call_backward: Callable[[int], None]
    backward_tasks: int
    strides: Strides | None  # of the rows of x, None where it is contiguous
    indices: Tensor  # like those of a call: zeros that share one entry
    heads: int
    dim: int
    pulls: bool  # whether the backward sums by itself what noise sends to the codes
    options: tuple[str, str]  # metric and gradient
    as_x: bool  # as of plan


@functools.lru_cache(maxsize=1024)
def plan(
    shape: torch.Size, strides: Strides | None, stored: torch.dtype, codes: torch.Size, computed: torch.dtype,
    metric: str, precision: str, gradient: str, averaging: tuple[float, float] | None = None, as_x: bool = False,
) -> Plan | None:  # fmt: skip
    """The plan for x (..., D) or (H, ..., D), and a contiguous codebook (K, D) or (H, K, D).

    Args:
        shape: of x.
        strides: of its rows, None where it is contiguous.
        stored: the dtype of x.
        codes: the shape of the codebook.
        computed: its dtype.
        metric: "l2" or "dot", or "cosine" with normalised codes.
        precision: as for the operator.
        gradient: as for the operator.
        averaging: the decay and the ε of an EMA update.
        as_x: x is contiguous, its rows are not, and ``quantized`` is laid out as x. The backward is for
            gradient="ste" with all rows in.

    Returns:
        None for what the other path refuses or does better: options and shapes that do not fit, half-precision
        codebooks, codebooks too large to be summed with the lookup.
    """
    if metric not in METRICS or precision not in PRECISIONS or gradient not in GRADIENTS:
        return None
    if len(codes) not in (2, 3) or len(shape) < len(codes) - 1 or shape[-1] != codes[-1] or 0 in shape or 0 in codes:
        return None
    heads, (num_codes, dim) = codes[0] if len(codes) == 3 else 1, codes[-2:]
    if (len(codes) == 3 and shape[0] != heads) or stored not in STORED_AS.get(computed, ()):
        return None
    item, size, rows = computed.itemsize, num_codes * dim, shape.numel() // (heads * dim)
    if not sums_by_chunk(heads, rows, num_codes, dim, item):
        return None
    cut = sizes_of(rows, num_codes, dim, item, True)
    tasks, laid = heads * cut.chunks, strides or Strides(rows * dim, dim)
    sizes = (
        ("partial counts", 8 * tasks * num_codes), ("partial losses", 16 * tasks), ("rows in", 8 * heads),
        ("counts", 8 * heads * num_codes), ("sums", item * heads * size), ("residual sums", item * heads * size),
        ("losses", 8 * heads), ("partial sums", item * tasks * size), ("codebook", item * heads * cut.workspace),
    )  # fmt: skip
    at, scratch = {}, 0
    for name, nbytes in sizes:
        at[name] = scratch
        scratch += nbytes + -nbytes % 64
    decay, eps = averaging or (0.0, 0.0)
    forward = ForwardArray(
        0, 0,
        *lookup_parameters(
            0, laid, (0, size), at["codebook"], (rows, num_codes, dim), cut, METRICS[metric], precision, 0, heads
        ),
        0, 0, size, 0, nan_and_zero(stored).data_ptr(), at["partial sums"], at["partial counts"], at["partial losses"],
        0, 0, 0, at["losses"], at["losses"], at["rows in"], 0, 0, 0, as_x,
        0, 0, 0, 0, 1, 1, 0, 0, 0, bits(decay), bits(eps), bits(1.0), 0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    chunk = max(1, BACKWARD_CHUNK // dim)
    if as_x:  # the straight-through backward goes entry by entry: rows of memory will do
        laid = Strides(rows * dim, dim)
    all_rows, nothing = (ctypes.c_int64 * heads)(*[heads * rows] * heads), ZERO[computed].data_ptr()
    backward_array = BackwardArray(
        0, 0, 0, laid.head, laid.row, 0, 0, 0, rows, 0, dim, rows * dim, dim, 1, nothing, nothing,
        0, 0, 0, 0, heads, chunk, 0, 0,
        metric == "cosine", gradient == "rotation", laid.group, laid.group_stride, laid.entry, bits(1.0), bits(1.0),
    )  # fmt: skip
    unwanted = tuple(at[name] for name in ("counts", "sums", "residual sums", "losses"))
    indices = torch.zeros((), dtype=torch.int64, device="cpu").expand(shape[:-1])
    kernel, kernel_backward = compiled(_step, stored), compiled(backward, stored)
    return Plan(
        forward, backward_array, all_rows, scratch, unwanted, tasks, heads * rows * num_codes * dim,
        kernel, entry(kernel), kernel_backward, entry(kernel_backward),
        heads * (-(-rows // chunk) + 1), strides, indices, heads, dim,
        pulls_in_task(rows, num_codes, dim, metric), (metric, gradient), as_x,
    )  # fmt: skip
