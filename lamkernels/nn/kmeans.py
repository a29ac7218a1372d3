"""Lloyd's k-means, over the rows of all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lamkernels.functional import code_statistics
from lamkernels.processes import Processes
from lamkernels.validation import Backend


def kmeans(
    rows: Tensor,
    num_codes: int,
    iterations: int,
    nearest: Callable[[Tensor, Tensor], Tensor],
    processes: Processes,
    backend: Backend,
) -> Tensor | None:
    """The codes that Lloyd's iterations reach from rows drawn at random, without replacement while there are enough.

    All processes return the same bits, after ``2 + iterations`` all_reduces. The rows drawn are those that one process
    with the joined batch and rank 0's state of torch's generator would draw. The host waits for the device.

    Args:
        rows: (N, D) finite; the processes may have different N, or 0.
        num_codes: K.
        iterations: how many.
        nearest: the index of the nearest of codes (K, D) for rows (N, D).
        processes: that have rows.
        backend: of the sums.

    Returns:
        (K, D) in the dtype of the rows; None where no process has a row.
    """
    rank, here = processes.rank, torch.arange(processes.size, device=rows.device) == processes.rank
    seed = torch.randint(2**53, (), device="cpu").to(rows.device)
    told = processes.sums({"sizes": here * len(rows), "seed": seed * (rank == 0)})
    *sizes, shared_seed = (int(number) for number in torch.cat([told["sizes"], told["seed"][None]]).tolist())
    if sum(sizes) == 0:
        return None
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(shared_seed), device="cpu")
    drawn = order[torch.arange(num_codes, device="cpu") % sum(sizes)].to(rows.device) - sum(sizes[:rank])
    mine = (drawn >= 0) & (drawn < len(rows))
    codes = rows.new_zeros(num_codes, rows.shape[1])
    codes[mine] = rows[drawn[mine]]
    codes = processes.sums({"codes": codes})["codes"].to(rows)
    for _ in range(iterations):
        counts, sums = code_statistics(rows, nearest(rows, codes), num_codes, backend=backend)
        total = processes.sums({"counts": counts, "sums": sums})
        means = total["sums"].to(rows) / total["counts"].clamp(min=1).to(rows)[:, None]
        codes = torch.where((total["counts"] > 0)[:, None], means, codes)
    return codes
