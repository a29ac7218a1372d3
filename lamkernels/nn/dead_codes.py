"""Which rows may replace dead codes: the same on all processes, every row of all of them equally likely.

The processes draw the same numbers u in [0, 1) for every code. If all hold equally many rows, a code's row is row u·N
of the joined batch, the batches in the order of the ranks: the rank that holds it sends it, the others send zeros, and
the sum is the row. So W processes draw the rows that one process with the joined batch would. If the batches differ in
length, which no rank can know before the sum, a rank with n rows is believed with probability n / max n: every row is
as likely as any other, and a code whose row is not believed waits for the next step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = 31  # of u and of the second number, integers here; so a batch has fewer than 2**32 rows
LOW = 2**32 - 1


class Candidates(NamedTuple):
    """The rows that may replace codes, and which of them do."""

    rows: Tensor  # (K, D), zero where they are not valid
    valid: Tensor  # (K,) bool


def uniform(step: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Two independent integers in [0, 2**31) for each code, a function of ``step`` () int64 alone.

    A generator would have a state to agree on, and to register with a CUDA graph.
    """
    count = torch.arange(num_codes, device=step.device) + step * num_codes
    first = _hashed(_hashed(count & LOW) ^ (count >> 32 & LOW))
    return first >> 1, _hashed(first ^ 0x1E3779B9) >> 1


def _hashed(word: Tensor) -> Tensor:
    """A permutation of [0, 2**32) that mixes all bits (Wellons 2018, "Prospecting for hash functions", lowbias32).

    The second factor is 0x846CA68B less 2**32: no product leaves int64. One that did, as those of a hash of 64 bits do,
    would be undefined behaviour in the C++ that torch.compile makes of it.
    """
    word = ((word ^ word >> 16) * 0x7FEB352D) & LOW
    word = ((word ^ word >> 15) * (0x846CA68B - 2**32)) & LOW
    return word ^ word >> 16


def own_candidates(numbers: Tensor, rows: Tensor, mask: Tensor | None, rank: int, world: int) -> Candidates:
    """The candidates that this process holds.

    Args:
        numbers: (K,), the first of :func:`uniform`.
        rows: (N, D); one that is not finite is not valid.
        mask: (N,) bool or None.
        rank: of this process.
        world: how many processes there are.
    """
    if rows.shape[0] == 0:
        return Candidates(rows.new_zeros(len(numbers), rows.shape[1]), torch.zeros_like(numbers, dtype=torch.bool))
    place = numbers * world  # the rank, and behind it the place among the rows of the rank
    drawn = ((place & (2**BITS - 1)) * rows.shape[0]) >> BITS
    candidates = rows[drawn]
    valid = candidates.isfinite().all(-1) & (place >> BITS == rank)
    if mask is not None:
        valid &= mask[drawn]
    return Candidates(torch.where(valid[:, None], candidates, 0.0), valid)


def believed(first: Tensor, second: Tensor, sizes: Tensor) -> Tensor:
    """(K,) bool: whether the rank that a code's row is from is believed, by ``sizes`` (W,) int64, the rows of each."""
    owner = (first * len(sizes)) >> BITS
    return (second * sizes.max()) >> BITS < sizes[owner]
