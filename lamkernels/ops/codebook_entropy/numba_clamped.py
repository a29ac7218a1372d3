"""Both entropies of lookup-free codes with the logarithm clamped, on the CPU, without the N × 2^D matrix.

The 2^D scores of a row are sums and differences of its entries, made by doubling, one entry after the other as a matrix
product adds them: at β = 100 the rounding of a score decides the fourth digit of a gradient, and other implementations
have this one. The work is that of the matrix, the memory one row of it and the mean distribution. Codes are in the
order of their bits reversed, which no sum over codes sees. For plain tensors, see :func:`lamkernels.eager.is_plain`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.eager import apply, is_ordinary
from lamkernels.ops.codebook_entropy.clamped import over_all_codes
from lamkernels.ops.elementary import exp_negative
from lamkernels.ops.nearest_code.numba import FLAGS, elements
from lamkernels.ops.parallel import bits, compiled, empty, launch
from lamkernels.ops.simd import at, computed_type, fetch_add, narrow, stored_type, widen, words

BLOCK = 64  # rows whose probabilities are added up in the computed type, in fp64 from there on
CHUNK, MAX_CHUNKS = 64, 16  # least rows in a task, and the most tasks of a codebook
MEANS = 1 << 22  # entries of partial means

# int64 parameters: 2 x (N, C, D), 3 N, 4 C, 5 D, 6 rows in a task, 7 tasks of a codebook, 8 and 9 the bits of 2β and of
# ε as fp64; forward: 10 partial sums of probabilities (C, tasks, 2^D) and 11 of entropies (C, tasks), fp64, 12
# log max(p, ε) + [p ≥ ε] of the mean p (C, 2^D), 13 sample entropy (), 14 entropy of the mean (); backward: 10 gradient
# of the sample entropy (), 11 of the entropy of the mean (), 12 as in the forward, 13 of x
PARAMETERS = 15


@njit(**FLAGS)
def _forward_tasks(p, stored, computed):
    a = carray(p, (PARAMETERS,))
    rows, books, dim, chunk, parts = a[3], a[4], a[5], a[6], a[7]
    codes, least = 1 << dim, narrow(np.log(a.view(np.float64)[9]), computed)
    scores, chances, sums = np.full(codes, computed), np.full(codes, computed), np.full(codes, computed)
    while True:
        task = fetch_add(a, 0)
        if task >= books * parts:
            return
        book, start = task // parts, task % parts * chunk
        total, entropy = elements(a[10], task * codes, codes, np.float64(0)), 0.0
        total[:] = 0.0
        for first in range(start, min(start + chunk, rows), BLOCK):
            sums[:] = computed
            for n in range(first, min(first + BLOCK, start + chunk, rows)):
                _distribution(a, n * books + book, scores, chances, stored, computed)
                entropy -= _entropy(chances, scores, least, sums)
            for k in range(codes):
                total[k] += sums[k]
        elements(a[11], task, 1, np.float64(0))[0] = entropy
        if fetch_add(a, 1) == books * parts - 1:
            _finish(a, computed)


@njit(**FLAGS)
def _distribution(a, n, scores, chances, stored, computed):
    """The probabilities of all codes for a row, and in ``scores`` their logarithms; NaN where it is not finite."""
    dim, settings = a[5], a.view(np.float64)
    row = elements(a[2], n * dim, dim, stored)
    twice, check = narrow(settings[8], computed), computed
    scores[0] = computed
    for d in range(dim):
        entry = widen(row[d])
        check += twice * entry * computed  # NaN from a NaN or an infinity
        size = 1 << d
        clear, chosen = carray(at(scores, 0), (size,)), carray(at(scores, size), (size,))
        for i in range(size):
            chosen[i] = clear[i] + entry
            clear[i] -= entry
    largest = twice * scores[0]
    for k in range(scores.shape[0]):
        scores[k] *= twice
        largest = max(largest, scores[k])
    total = check
    for k in range(scores.shape[0]):
        scores[k] -= largest
        chances[k] = exp_negative(scores[k])
        total += chances[k]
    inverse, log_total = narrow(1.0, computed) / total, narrow(np.log(total), computed)
    for k in range(scores.shape[0]):
        chances[k] *= inverse
        scores[k] -= log_total


@njit(**FLAGS)
def _entropy(chances, logarithms, least, sums):
    """Σ p log max(p, ε) of a row, and adds the p to ``sums``."""
    terms = least * np.float32(0.0)
    for k in range(chances.shape[0]):
        terms += chances[k] * max(logarithms[k], least)
        sums[k] += chances[k]
    return np.float64(terms)


@njit(**FLAGS)
def _finish(a, computed):
    """The means over rows and codebooks, of the parts in their order."""
    rows, books, parts, codes = a[3], a[4], a[7], 1 << a[5]
    smallest, sample, of_means = a.view(np.float64)[9], 0.0, 0.0
    for task in range(books * parts):
        sample += elements(a[11], task, 1, np.float64(0))[0]
    for book in range(books):
        mean = elements(a[10], book * parts * codes, codes, np.float64(0))
        surprise = elements(a[12], book * codes, codes, computed)
        for part in range(1, parts):
            mean += elements(a[10], (book * parts + part) * codes, codes, np.float64(0))
        for k in range(codes):
            p = mean[k] / rows
            log_p = np.log(max(p, smallest))
            of_means -= p * log_p
            surprise[k] = log_p + (p >= smallest)
    elements(a[13], 0, 1, computed)[0] = sample / (rows * books)
    elements(a[14], 0, 1, computed)[0] = of_means / books


@njit(**FLAGS)
def _backward_tasks(p, stored, computed):
    a = carray(p, (PARAMETERS,))
    rows, books, dim, chunk, parts = a[3], a[4], a[5], a[6], a[7]
    codes, settings = 1 << dim, a.view(np.float64)
    least, step = narrow(np.log(settings[9]), computed), narrow(settings[8], computed)
    scores, chances = np.full(codes, computed), np.full(codes, computed)
    weight = -1.0 / (rows * books)
    of_sample = narrow(weight * elements(a[10], 0, 1, computed)[0], computed)
    of_mean = narrow(weight * elements(a[11], 0, 1, computed)[0], computed)
    while True:
        task = fetch_add(a, 0)
        if task >= books * parts:
            return
        book, start = task // parts, task % parts * chunk
        surprise = elements(a[12], book * codes, codes, computed)
        for n in range(start, min(start + chunk, rows)):
            _distribution(a, n * books + book, scores, chances, stored, computed)
            _to_scores(chances, scores, least, of_sample, of_mean, surprise)
            grad_x = elements(a[13], (n * books + book) * dim, dim, stored)
            for d in range(dim - 1, -1, -1):  # the last entry is the highest bit
                grad_x[d] = narrow(step * _fold(chances, 1 << d), stored)


@njit(**FLAGS)
def _to_scores(chances, logarithms, least, of_sample, of_mean, surprise):
    """The gradient of a row's scores in the place of its probabilities: p (g − Σ p g)."""
    mean = least * np.float32(0.0)
    for k in range(chances.shape[0]):
        kept = np.float32(1.0) if logarithms[k] >= least else np.float32(0.0)
        logarithms[k] = of_sample * (max(logarithms[k], least) + kept) + of_mean * surprise[k]
        mean += chances[k] * logarithms[k]
    for k in range(chances.shape[0]):
        chances[k] *= logarithms[k] - mean


@njit(**FLAGS)
def _fold(grads, half):
    """Σ over the values with the highest bit set − Σ over the others; then sums over that bit are in the first half."""
    clear, chosen = carray(at(grads, 0), (half,)), carray(at(grads, half), (half,))
    difference = clear[0] * np.float32(0.0)
    for i in range(half):
        difference += chosen[i] - clear[i]
        clear[i] += chosen[i]
    return difference


def _forward(p):
    _forward_tasks(words(p), stored_type(p), computed_type(p))


def _backward(p):
    _backward_tasks(words(p), stored_type(p), computed_type(p))


def clamped_entropies(x: Tensor, codebook: Tensor, inv_temperature: float, smallest: float) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.lookup_free.clamped_entropies`; for plain x with at least one row."""
    constants = inv_temperature, smallest
    if x.requires_grad and torch.is_grad_enabled():
        return apply(Entropies, x, codebook, constants)  # type: ignore[no-any-return]
    return _run_forward(x, constants)[:2]


def _run_forward(x: Tensor, constants: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    x, (_, books, dim), computed = x.contiguous(), x.shape, torch.float64 if x.dtype == torch.float64 else torch.float32
    common, parts = _common(x, constants)
    means = torch.empty((books, parts, 2**dim), dtype=torch.float64, device="cpu")
    entropies = torch.empty((books, parts), dtype=torch.float64, device="cpu")
    surprise = torch.empty((books, 2**dim), dtype=computed, device="cpu")
    sample, of_mean = (torch.empty((), dtype=computed, device="cpu") for _ in range(2))
    parameters = *common, *(t.data_ptr() for t in (means, entropies, surprise, sample, of_mean))
    launch(compiled(_forward, x.dtype), parameters, books * parts, _work(x))
    return sample, of_mean, surprise


def _common(x: Tensor, constants: tuple[float, float]) -> tuple[tuple[int, ...], int]:
    """The first parameters, and how many tasks a codebook has: by the shape alone, and so the result is."""
    (rows, books, dim), (inv_temperature, smallest) = x.shape, constants
    chunk = max(CHUNK, -(-rows // max(1, min(MAX_CHUNKS, MEANS >> dim))))
    parts = -(-rows // chunk)
    settings = bits(2.0 * inv_temperature), bits(smallest)
    return (x.data_ptr(), rows, books, dim, chunk, parts, *settings), parts


def _work(x: Tensor) -> int:
    rows, books, dim = x.shape
    return 16 * rows * books << dim


class Entropies(torch.autograd.Function):
    """x -> both entropies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, constants: tuple[float, float]) -> tuple[Tensor, Tensor]:
        sample, of_mean, surprise = _run_forward(x, constants)
        ctx.constants = constants
        ctx.save_for_backward(x, codebook, surprise)
        return sample, of_mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, codebook, surprise = ctx.saved_tensors
        if not is_ordinary(*grads):
            with torch.enable_grad():  # for second derivatives, and gradients in batches
                entropies = over_all_codes(x, codebook, *ctx.constants)
            return *torch.autograd.grad(entropies, x, grads, create_graph=torch.is_grad_enabled()), None, None
        x, surprise, grad_x = x.contiguous(), surprise.contiguous(), empty(x.shape, x.dtype)
        common, parts = _common(x, ctx.constants)
        parameters = *common, *(t.data_ptr() for t in (*grads, surprise, grad_x)), 0
        launch(compiled(_backward, x.dtype), parameters, x.shape[1] * parts, _work(x))
        return grad_x, None, None
