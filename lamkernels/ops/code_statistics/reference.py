"""The specification of code_statistics: fp64 sums in row order."""

from __future__ import annotations

import torch
from torch import Tensor


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.code_statistics`. ``x`` (H, ..., D), ``indices`` (H, N) int64."""
    x = x.flatten(1, -2)
    heads, _, dim = x.shape
    counted = (indices >= 0) & (indices < num_codes) & x.isfinite().all(-1)  # (H, N)
    code = indices.where(counted, num_codes)  # the rows that do not count go to one code too many
    counts = torch.zeros((heads, num_codes + 1), dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, code, torch.ones_like(code))
    sums = torch.zeros((heads, num_codes + 1, dim), dtype=torch.float64, device=x.device)
    for head in range(heads):
        sums[head].index_add_(0, code[head], x[head].double())
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return counts[:, :num_codes].contiguous(), sums[:, :num_codes].to(dtype).contiguous()
