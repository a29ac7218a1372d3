"""The upkeep of a codebook in Triton: what nn/learned_codebook.py writes as some 14 and 64 operators of torch.

Each of those is a launch, which costs more than its arithmetic. Not yet measured on a GPU.
"""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.triton_common import first_entries, is_finite, on_device, rows_in_place

TYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CODES = 4096  # every program adds up the sizes of all codes
BITS = tl.constexpr(31)  # of a random number: see nn/dead_codes.py


@triton.jit
def move_averages(
    code: tensor, sizes_before: tensor, cluster_size: tensor, code_sums: tensor, count: tensor, total: tensor,
    k: tensor, d: tensor, num_codes: tensor, dim: tensor, share: tensor, rows: tensor, eps: tensor,
) -> None:  # fmt: skip
    """The update of code k that ``LearnedCodebook.update_codebook`` describes; ``share`` is 1 − γ.

    Programs of other codes need all sizes as they were, so they read a copy. Σ of the new sizes is that of the old ones
    moved towards the number of rows.
    """
    lane = tl.arange(0, 128)
    everyone = tl.zeros([128], tl.float64)
    for first in range(0, num_codes, 128):
        everyone += tl.load(sizes_before + first + lane, mask=first + lane < num_codes, other=0.0)
    all_sizes = tl.sum(everyone, axis=0)
    all_sizes = (all_sizes + share * (rows - all_sizes)).to(tl.float32)
    size = interpolate(tl.load(sizes_before + k), count, share)
    summed = interpolate(tl.load(code_sums + k * dim + d, mask=d < dim, other=0.0), total, share)
    tl.debug_barrier()  # several threads may have read what one of them overwrites
    tl.store(cluster_size + k, size)  # the same by all programs of this code
    tl.store(code_sums + k * dim + d, summed, mask=d < dim)
    smoothed = (size + eps) * (all_sizes / (all_sizes + num_codes * eps))
    tl.store(code + d, summed / smoothed, mask=d < dim)


@triton.jit
def interpolate(start: tensor, end: tensor, share: tensor) -> tensor:
    """As torch.lerp."""
    return tl.where(share < 0.5, start + share * (end - start), end - (end - start) * (1.0 - share))


@triton.jit
def moving_averages_kernel(
    counts: tensor, sums: tensor, codebook: tensor, sizes_before: tensor, cluster_size: tensor, code_sums: tensor,
    num_codes: tensor, dim: tensor, chunks: tensor, share: tensor, eps: tensor,
    BD: tl.constexpr,
) -> None:  # fmt: skip
    k = (tl.program_id(0) // chunks).to(tl.int64)
    d = (tl.program_id(0) % chunks) * BD + tl.arange(0, BD)
    lane = tl.arange(0, 128)
    everyone = tl.zeros([128], tl.int64)
    for first in range(0, num_codes, 128):
        everyone += tl.load(counts + first + lane, mask=first + lane < num_codes, other=0)
    rows = tl.sum(everyone, axis=0)
    total = tl.load(sums + k * dim + d, mask=d < dim, other=0.0)
    move_averages(
        codebook + k * dim, sizes_before, cluster_size, code_sums, tl.load(counts + k).to(tl.float32), total, k, d,
        num_codes, dim, tl.where(rows > 0, share, 0.0), rows.to(tl.float64), eps,
    )  # fmt: skip


@triton.jit
def hashed(word: tensor) -> tensor:
    """As in nn/dead_codes.py, of uint32."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def replace_dead_codes_kernel(
    x: tensor, mask: tensor, draws: tensor, codebook: tensor, cluster_size: tensor, code_sums: tensor, replaced: tensor,
    num_rows: tensor, num_codes: tensor, dim: tensor, x_b: tensor, x_l: tensor, x_n: tensor, x_d: tensor,
    threshold: tensor,
    MASK: tl.constexpr, SUMS: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """A code a program: draws its row, and writes it where the code is dead and the row finite and in."""
    k = tl.program_id(0).to(tl.int64)
    count = k + tl.load(draws) * num_codes
    word = hashed(hashed(count.to(tl.uint32)) ^ (count >> 32).to(tl.uint32))
    row = ((word >> 1).to(tl.int64) * num_rows) >> BITS
    first = first_entries(x, row, x_b, x_l, x_n)
    write = tl.load(cluster_size + k) < threshold
    if MASK:
        write = write & (tl.load(mask + row) != 0)
    for start in range(0, dim, BD):
        d = start + tl.arange(0, BD)
        entry = tl.load(first + d * x_d, mask=d < dim, other=0.0)
        write = write & (tl.min(is_finite(entry.to(tl.float32)).to(tl.int32), axis=0) > 0)
    if write:
        for start in range(0, dim, BD):
            d = start + tl.arange(0, BD)
            entry = tl.load(first + d * x_d, mask=d < dim, other=0.0).to(tl.float32)
            tl.store(codebook + k * dim + d, entry, mask=d < dim)
            if SUMS:
                tl.store(code_sums + k * dim + d, entry * threshold, mask=d < dim)
        tl.debug_barrier()  # all threads have read the size
        tl.store(cluster_size + k, threshold)
    tl.store(replaced + k, write.to(tl.int8))


def moving_averages(
    counts: Tensor, sums: Tensor, codebook: Tensor, cluster_size: Tensor, code_sums: Tensor, share: float, eps: float
) -> None:
    """One update of the averages and the codebook (K, D), K at most ``MAX_CODES``: two launches, with torch's copy.

    Args:
        counts: (K,) int64, contiguous as all of these.
        sums: (K, D) fp32.
        codebook: (K, D) fp32; updated, as are the next two.
        cluster_size: (K,) fp32.
        code_sums: (K, D) fp32.
        share: 1 − γ.
        eps: ε of the smoothing.
    """
    (num_codes, dim), entries = codebook.shape, tuning.power(min(codebook.shape[1], 128))
    chunks = tuning.ceil_div(dim, entries)
    with on_device(codebook):
        moving_averages_kernel[(num_codes * chunks,)](
            counts, sums, codebook, cluster_size.clone(), cluster_size, code_sums, num_codes, dim, chunks, share, eps,
            entries, **tuning.PLAIN.options(),
        )  # fmt: skip


def replace_dead_codes(
    x: Tensor, mask: Tensor | None, draws: Tensor, codebook: Tensor, cluster_size: Tensor, code_sums: Tensor | None,
    threshold: float,
) -> Tensor:  # fmt: skip
    """Writes rows of x over the codes whose size is below a threshold, in one launch.

    Args:
        x: (1, N, D) or (1, B, N / B, D), N at least 1; fp32, fp16 or bf16.
        mask: (N,) bool, contiguous, or None: which rows are in.
        draws: () int64: see :func:`lamkernels.nn.dead_codes.uniform`.
        codebook: (K, D) fp32, contiguous; updated, as are the next two.
        cluster_size: (K,) fp32.
        code_sums: (K, D) fp32, or None.
        threshold: also the new size.

    Returns:
        (K,) bool: which codes were replaced.
    """
    (num_codes, dim), rows, (x, strides) = codebook.shape, x.shape[1:-1].numel(), rows_in_place(x)
    replaced = draws.new_empty(num_codes, dtype=torch.int8)
    with on_device(x):
        replace_dead_codes_kernel[(num_codes,)](
            x, replaced if mask is None else mask, draws, codebook, cluster_size,
            codebook if code_sums is None else code_sums, replaced, rows, num_codes, dim, *strides[1:], threshold,
            mask is not None, code_sums is not None, tuning.power(min(dim, 128)), **tuning.PLAIN.options(),
        )  # fmt: skip
    return replaced.view(torch.bool)
