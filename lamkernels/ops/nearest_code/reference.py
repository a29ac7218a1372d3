"""The specification of nearest_code: fp64 scores, in blocks of rows that bound the memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lamkernels.ops.constants import COSINE_EPS

SCORES_PER_BLOCK = 2**22  # fp64 scores held at a time: 32 MiB


def nearest_code(
    x: Tensor, codebook: Tensor, metric: str, precision: str, return_distance: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`lamkernels.nearest_code`. ``x`` (H, ..., D), ``codebook`` (H, K, D); metric "l2", "dot", or
    "cosine" with codes that are normalised already.

    Every precision is met by the strictest one. The score of a code that is not finite is +inf; a row that is not
    finite, or that has no finite code to go to, gets index −1 and distance NaN.
    """
    x = x.flatten(1, -2)
    (heads, rows, _), num_codes = x.shape, codebook.shape[1]
    codes = codebook.double()
    finite_code = codes.isfinite().all(-1)  # (H, K)
    codes = codes.masked_fill(~finite_code[..., None], 0.0)
    indices = torch.empty((heads, rows), dtype=torch.int64, device=x.device)
    score = torch.empty((heads, rows), dtype=torch.float64, device=x.device)
    step = max(1, SCORES_PER_BLOCK // (heads * num_codes))
    for start in range(0, rows, step):
        block = x[:, start : start + step].double()
        valid = block.isfinite().all(-1) & finite_code.any(-1, keepdim=True)
        block = block.masked_fill(~valid[..., None], 0.0)
        if metric == "cosine":
            block = F.normalize(block, dim=-1, eps=COSINE_EPS)
        if metric == "l2":  # differences, not the expanded square: no cancellation
            scores = torch.cdist(block, codes, compute_mode="donot_use_mm_for_euclid_dist").square_()
        else:
            scores = -(block @ codes.mT)
        scores.masked_fill_(~finite_code[:, None, :], torch.inf)
        best, index = scores.min(-1)  # the lowest index among equals
        indices[:, start : start + step] = torch.where(valid, index, -1)
        score[:, start : start + step] = torch.where(valid, best, torch.nan)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    distance = (score if metric == "l2" else -score).to(dtype)
    return indices, distance if return_distance else distance[:, :0].clone()
