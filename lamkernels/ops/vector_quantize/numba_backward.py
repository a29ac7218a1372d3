"""The backward of vector_quantize on the CPU: one pass over the rows, and one over the residual sums of the codes."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lamkernels.ops.code_statistics.numba import sum_rows
from lamkernels.ops.constants import COSINE_EPS, ROTATION_EPS
from lamkernels.ops.nearest_code.numba import FLAGS, elements, gather_rows, inverse_norm, row_strides
from lamkernels.ops.parallel import bits, compiled, empty, launch
from lamkernels.ops.simd import at, computed_type, fetch_add, narrow, stored_type, widen, words

# int64 parameters of the backward: 2 x, 3 head stride, 4 row stride, 5 codes (H, N, D), 6 indices (H, N), of
# quantized or 0, 8 N, 9 K, 10 D, 11 to 13 its strides, 14 gradient of the commitment loss (H,), 15 of the codebook loss
# (H,), 16 rows that are in (H,), 17 residual sums, 18 gradient of x, 19 of the codebook, 20 H, 21 chunk, 22 noise
# (H, N, D) or 0, 23 what the noise sends to the codes, negated (H, N, D), or 0 where the task of the rows subtracts it,
# 24 cosine, 25 rotation, 26 to 28 groups of rows of x, as 19 to 21 of the lookup, LOSS_WEIGHTS and the next the bits of
# what the gradients of the two losses are multiplied by, as fp64
LOSS_WEIGHTS = 29
BACKWARD = 31
BACKWARD_CHUNK = 1 << 16  # entries of x in a task
GATHERED = 1 << 12  # entries of x that are gathered at a time
MAX_PULLED = 1 << 13  # entries of a codebook whose pulls a task sums by itself


@njit(**FLAGS)
def _backward_chunks(p, stored, computed):
    a = carray(p, (BACKWARD,))
    rows, num_codes, dim, chunk = a[8], a[9], a[10], a[21]
    chunks = (rows + chunk - 1) // chunk + 1  # the last one is the codebook's
    noisy, general = a[22] != 0, a[22] != 0 or a[24] != 0 or (a[25] != 0 and a[7] != 0)
    pulling = noisy and a[23] == 0
    flat = not general and (a[26] != 0 or a[4] == dim) and (a[7] == 0 or (a[12] == dim and a[13] == 1))
    piece = chunk if a[26] == 0 and flat else max(GATHERED // dim, 1)  # rows that are done in one loop
    weights, row_type = a.view(np.float64), elements(a[2], 0, 1, stored).dtype
    scratch = np.empty(dim if general else 0), np.empty(dim if general else 0)
    staging = np.empty(piece * dim if a[26] != 0 else 0, row_type)
    pulls = np.empty(num_codes * dim if pulling else 0)
    spread = np.empty(piece * dim if noisy and a[13] != 1 else 0, row_type)
    room = np.empty(piece if noisy else 0), staging, spread, pulls, scratch[0]
    while True:
        task = fetch_add(a, 0)
        if task >= chunks * a[20]:
            return
        head, first = task // chunks, task % chunks * chunk
        inside = elements(a[16], head, 1, np.int64(0))[0]
        scale = 2.0 / (np.float64(max(inside, 1)) * np.float64(dim))
        if task % chunks == chunks - 1:
            if not pulling:
                _send_to_codes(a, head, scale * weights[LOSS_WEIGHTS + 1], pulls, computed)
            continue
        weight = narrow(scale * weights[LOSS_WEIGHTS] * elements(a[14], head, 1, computed)[0], computed)
        indices = elements(a[6], head * rows, rows, np.int64(0))
        stop = min(first + chunk, rows)
        if flat:
            for start in range(first, stop, piece):
                end = min(start + piece, stop)
                least = indices[start]
                for n in range(start, end):
                    least = min(least, indices[n])
                if least >= 0:  # all rows in one piece
                    _straight_through(a, _rows(a, head, start, end, staging, stored), weight, stored)
                else:
                    _rows_apart(a, head, start, end, weight, staging, stored)
        elif not general:
            _rows_apart(a, head, first, stop, weight, staging, stored)
        else:
            pulls[:] = 0.0
            for start in range(first, stop, piece):
                end = min(start + piece, stop)
                if noisy and a[24] == 0:
                    _noisy_rows(a, head, start, end, weight, room, stored, computed)
                    continue
                for n in range(start, end):
                    row = _rows(a, head, n, n + 1, staging, stored)
                    if indices[n] < 0:
                        row[3][:] = 0
                    else:
                        _general_row(a, (head * rows + n) * dim, row, weight, scratch, stored, computed)
            if pulling:
                _send_to_codes(a, head, scale * weights[LOSS_WEIGHTS + 1], pulls, computed)


@njit(**FLAGS)
def _send_to_codes(a, head, weight, pulls, computed):
    """The gradient of the codebook of a head: that of its loss less what was pulled, if anything."""
    size = a[9] * a[10]
    residual_sums = elements(a[17], head * size, size, computed)
    grad_codebook = elements(a[19], head * size, size, computed)
    weight = -weight * elements(a[15], head, 1, computed)[0]
    for i in range(size):
        grad_codebook[i] = weight * residual_sums[i]
    for i in range(pulls.shape[0]):
        grad_codebook[i] -= pulls[i]


@njit(**FLAGS)
def _rows_apart(a, head, start, stop, weight, staging, stored):
    """Rows that do not lie behind one another, or of which some are not in: these get no gradient."""
    indices = elements(a[6], head * a[8], a[8], np.int64(0))
    for n in range(start, stop):
        row = _rows(a, head, n, n + 1, staging, stored)
        if indices[n] < 0:
            row[3][:] = 0
        else:
            _straight_through(a, row, weight, stored)


@njit(**FLAGS)
def _straight_through(a, row, weight, stored):
    """The gradient of the entries of one row, or of many that lie behind one another, in one loop to vectorise."""
    x, codes, grad, grad_x = row
    if a[7] == 0:
        for d in range(x.shape[0]):
            grad_x[d] = narrow(weight * (widen(x[d]) - widen(codes[d])), stored)
    elif a[13] == 1:
        for d in range(x.shape[0]):
            grad_x[d] = narrow(widen(grad[d]) + weight * (widen(x[d]) - widen(codes[d])), stored)
    else:  # an expanded gradient, as sum() sends it
        same = widen(grad[0])
        for d in range(x.shape[0]):
            grad_x[d] = narrow(same + weight * (widen(x[d]) - widen(codes[d])), stored)


@njit(**FLAGS)
def _rows(a, head, start, stop, staging, stored):
    """The entries of one row of a head, or of many that lie behind one another or are gathered: of x, its codes, the
    gradient of quantized, and the gradient of x.

    Arrays of their own: in one of the whole head an index might be negative for all the compiler knows, and no loop
    over it is vectorised.
    """
    at, size = (head * a[8] + start) * a[10], (stop - start) * a[10]
    x = staging[:size] if a[26] != 0 else elements(a[2], head * a[3] + start * a[4], size, stored)
    if a[26] != 0:
        gather_rows(a, 26, head, start, stop, staging, stored)
    return (
        x,
        elements(a[5], at, size, stored),
        elements(a[7], head * a[11] + start * a[12], (size - 1) * a[13] + 1, stored),
        elements(a[18], at, size, stored),
    )


@njit(**FLAGS)
def _noisy_rows(a, head, start, stop, weight, room, stored, computed):
    """The gradient of rows under noise substitution, in fp64; what their codes are pulled by is added to the pulls.

    NSVQ: g + a(x − c)/r for x, of which the second part with the other sign for the code. A step at a time for all
    rows, so that while one row's sums arrive the next ones are under way.
    """
    (factors, staging, spread, pulls, one), dim, count = room, a[10], stop - start
    place, size = (head * a[8] + start) * dim, count * dim
    codes, noise = elements(a[5], place, size, stored), elements(a[22], place, size, stored)
    grad_x, sent = elements(a[18], place, size, stored), elements(a[23], place, size, computed)
    indices = elements(a[6], head * a[8] + start, count, np.int64(0))
    x, x_step = elements(a[2], head * a[3] + start * a[4], count * a[4], stored), a[4]
    if a[26] != 0:
        gather_rows(a, 26, head, start, stop, staging, stored)
        x, x_step = staging, dim
    grad, grad_step = elements(a[7], head * a[11] + start * a[12], count * a[12] + dim * a[13], stored), a[12]
    if a[13] != 1:
        for n in range(count):
            for d in range(dim):
                spread[n * dim + d] = grad[n * grad_step + d * a[13]]
        grad, grad_step = spread, dim
    for n in range(count):
        row, g = carray(at(x, n * x_step), (dim,)), carray(at(grad, n * grad_step), (dim,))
        code, direction = carray(at(codes, n * dim), (dim,)), carray(at(noise, n * dim), (dim,))
        along, length, distance = 0.0, 0.0, 0.0
        for d in range(dim):
            v, residual = np.float64(widen(direction[d])), np.float64(widen(row[d])) - np.float64(widen(code[d]))
            along += np.float64(widen(g[d])) * v
            length += v * v
            distance += residual * residual
        both = np.sqrt(length) * np.sqrt(distance)
        factors[n] = along / both if both > 0.0 else 0.0
    pulled, code_step = (pulls, dim) if a[23] == 0 else (one, 0)
    for n in range(count):
        out = carray(at(grad_x, n * dim), (dim,))
        if indices[n] < 0:
            out[:] = 0
            continue
        pull = carray(at(pulled, indices[n] * code_step), (dim,))
        if code_step == 0:
            pull[:] = 0.0
        row, g = carray(at(x, n * x_step), (dim,)), carray(at(grad, n * grad_step), (dim,))
        code, factor = carray(at(codes, n * dim), (dim,)), factors[n]
        for d in range(dim):
            residual = np.float64(widen(row[d])) - np.float64(widen(code[d]))
            pull[d] += factor * residual
            out[d] = narrow(np.float64(widen(g[d])) + weight * residual + factor * residual, stored)
        if code_step == 0:
            sent[n * dim : (n + 1) * dim] = pull


@njit(**FLAGS)
def _general_row(a, at, entries, weight, scratch, stored, computed):
    """The gradient of one row under the rotation trick, noise substitution or the cosine, in fp64."""
    (x, codes, grad, grad_x), (row, g) = entries, scratch
    dim = row.shape[0]
    cosine, rotation, noisy = a[24] != 0, a[25] != 0, a[22] != 0
    inverse = inverse_norm(x) if cosine else 1.0
    for d in range(dim):
        row[d] = np.float64(widen(x[d])) * inverse
        g[d] = 0.0
    if a[7] != 0:
        for d in range(dim):
            g[d] = widen(grad[d * a[13]])
        if rotation:
            _rotate(row, codes, g)
        elif noisy:
            _pull(row, codes, elements(a[22], at, dim, stored), g, elements(a[23], at, dim, computed))
    along = 0.0
    for d in range(dim):
        g[d] += weight * (row[d] - widen(codes[d]))
        along += g[d] * row[d]
    if not cosine or inverse == 1.0 / COSINE_EPS:  # a clamped norm is a constant
        along = 0.0
    for d in range(dim):
        grad_x[d] = narrow((g[d] - along * row[d]) * inverse, stored)


@njit(**FLAGS)
def _rotate(row, codes, g):
    """g ← s(g − 2(g·w)w + 2(g·q̂)u), in place."""
    dim = row.shape[0]
    length, target = 0.0, 0.0
    for d in range(dim):
        length += row[d] * row[d]
        target += np.float64(widen(codes[d])) ** 2
    norm = np.sqrt(target)
    to_unit, target_to_unit = 1.0 / max(np.sqrt(length), ROTATION_EPS), 1.0 / max(norm, ROTATION_EPS)
    both, along_both, along_target = 0.0, 0.0, 0.0
    for d in range(dim):
        towards = widen(codes[d]) * target_to_unit
        w = row[d] * to_unit + towards
        both += w * w
        along_both += g[d] * w
        along_target += g[d] * towards
    along_both /= max(np.sqrt(both), ROTATION_EPS) ** 2
    for d in range(dim):
        u, towards = row[d] * to_unit, widen(codes[d]) * target_to_unit
        g[d] = norm * to_unit * (g[d] - 2.0 * along_both * (u + towards) + 2.0 * along_target * u)


@njit(**FLAGS)
def _pull(row, codes, noise, g, pull):
    """NSVQ: g ← g + a(x − c)/r, in place; the second part is kept for the code."""
    dim = row.shape[0]
    along, length, distance = 0.0, 0.0, 0.0
    for d in range(dim):
        along += g[d] * widen(noise[d])
        length += np.float64(widen(noise[d])) ** 2
        distance += (row[d] - widen(codes[d])) ** 2
    size = np.sqrt(length) * np.sqrt(distance)
    factor = along / size if size > 0.0 else 0.0
    for d in range(dim):
        part = factor * (row[d] - widen(codes[d]))
        pull[d] = part
        g[d] += part


def backward(p):
    """The kernel of the backward."""
    _backward_chunks(words(p), stored_type(p), computed_type(p))


def pulls_in_task(rows: int, num_codes: int, dim: int, metric: str) -> bool:
    """Whether the rows of a head are one task of the backward, which sums what noise sends to the codes by itself."""
    return rows <= max(1, BACKWARD_CHUNK // dim) and num_codes * dim <= MAX_PULLED and metric != "cosine"


def vector_quantize_backward(
    x: Tensor, codes: Tensor, indices: Tensor, residual_sums: Tensor, num_rows: Tensor, noise: Tensor | None,
    grad_quantized: Tensor | None, grad_commitment: Tensor, grad_codebook_loss: Tensor, metric: str, gradient: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One pass over the rows and one over the residual sums; see the reference for the formulas."""
    (heads, rows, dim), num_codes, strides = codes.shape, residual_sums.shape[1], row_strides(x)
    codes, indices, residual_sums = codes.contiguous(), indices.contiguous(), residual_sums.contiguous()
    grad_commitment, grad_codebook_loss = grad_commitment.contiguous(), grad_codebook_loss.contiguous()
    num_rows = num_rows.contiguous()
    if grad_quantized is not None and grad_quantized.stride(-1) not in (0, 1):
        grad_quantized = grad_quantized.contiguous()
    noise = None if noise is None or grad_quantized is None else noise.contiguous()
    grad_x = empty(x.shape, x.dtype)
    grad_codebook = torch.empty_like(residual_sums)
    chunk = max(1, BACKWARD_CHUNK // dim)
    pull = None
    if noise is not None and not pulls_in_task(rows, num_codes, dim, metric):
        pull = empty((heads, rows, dim), residual_sums.dtype)
    parameters = [
        x.data_ptr(),
        strides.head,
        strides.row,
        codes.data_ptr(),
        indices.data_ptr(),
        0 if grad_quantized is None else grad_quantized.data_ptr(),
        rows,
        num_codes,
        dim,
        *((0, 0, 0) if grad_quantized is None else grad_quantized.stride()),
        grad_commitment.data_ptr(),
        grad_codebook_loss.data_ptr(),
        num_rows.data_ptr(),
        residual_sums.data_ptr(),
        grad_x.data_ptr(),
        grad_codebook.data_ptr(),
        heads,
        chunk,
        0 if noise is None else noise.data_ptr(),
        0 if pull is None else pull.data_ptr(),
        metric == "cosine",
        gradient == "rotation",
        strides.group,
        strides.group_stride,
        strides.entry,
        bits(1.0),
        bits(1.0),
    ]
    tasks = heads * (-(-rows // chunk) + 1)
    launch(compiled(backward, x.dtype), parameters, tasks, 4 * heads * rows * dim)
    if pull is not None:
        pulls = torch.empty_like(residual_sums)
        sum_rows(pull, indices, None, num_rows.new_empty((heads, num_codes)), pulls, None)
        grad_codebook -= pulls
    return grad_x, grad_codebook
