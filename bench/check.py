"""Correctness before timing: every provider's first result is held against fp64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .workloads import Inputs, Workload

DECAY, EPS = 0.8, 1e-5  # of the EMA update that every train_step provider runs
MACS = {"cpu": 4e10, "cuda": 2e13}  # products of one check; more rows than this allows are sampled evenly
BLOCK = {"cpu": 2**23, "cuda": 2**26}  # fp64 scores held at a time
TOLERANCE = 1e-4  # of outputs other than indices, relative to the terms that they sum up
SANITY = 2.0**-7  # a peer's regret relative to ‖x‖·max‖c‖ + max‖c‖²: what bf16 scores would do


class Check(NamedTuple):
    """How right a result is.

    Attributes:
        error: what is wrong with it, or "".
        mismatch_rate: the share of checked rows whose index is not the fp64 argmin; None without a lookup.
        max_regret: the largest (d(index) − d(argmin)) / d(argmin) over those rows, in fp64.
        contract: no row's regret exceeds the bound of ``precision="default"`` (docs/numerics.md).
        checked_rows: how many rows were compared.
    """

    error: str
    mismatch_rate: float | None = None
    max_regret: float | None = None
    contract: bool | None = None
    checked_rows: int = 0


def check(
    workload: Workload, inputs: Inputs, result: Mapping[str, Any], *, strict: bool, few_rows: float = 0.0
) -> Check:  # fmt: skip
    """Compares the result of the first call, on buffer 0, with fp64.

    Args:
        workload: what was run.
        inputs: what it was run on.
        result: by name, whichever of these the provider has: indices, quantized, loss, counts, sums, grad_x and
            codebook (after the update); or xx, xy and yy, covariances. Nothing is right where nothing is computed.
        strict: hold the results to the numerics contract; otherwise only to a bound that any sane lookup meets.
        few_rows: the error allowed to covariances of fewer than 100 rows to a column, where larger.
    """
    x, codebook = inputs.x[0].detach(), inputs.codebook
    if not result:
        return Check("")
    if workload.op == "covariance":
        return check_covariances(x, workload.K, result, strict=strict, few_rows=few_rows)
    got = {name: torch.as_tensor(value).detach().to(x.device) for name, value in result.items()}
    indices = inputs.indices[0]
    verdict = Check("")
    if workload.op != "code_statistics":
        indices = got["indices"].reshape(-1).long()
        if indices.shape != x.shape[:1]:
            return Check(f"{indices.numel()} indices for {workload.N} rows")
        if int(indices.min()) < 0 or int(indices.max()) >= workload.K:
            return Check(f"an index is outside [0, {workload.K})")
        verdict = check_indices(x, codebook, indices, strict=strict)
    if verdict.error:
        return verdict
    errors = [f"{name} is off by {error:.1e}" for name, error in _errors(x, codebook, indices, got) if not error <= 1.0]
    return verdict._replace(error="; ".join(errors))


def check_covariances(
    x: Tensor, lag: int, result: Mapping[str, Any], *, strict: bool, few_rows: float = 0.0
) -> Check:  # fmt: skip
    """The relative Frobenius error of covariances of x (N, D) and of its rows ``lag`` later, by the fp64 ones."""
    contract = {"cpu": 1e-7, "cuda": 1e-6}[x.device.type] if x.dtype == torch.float32 else TOLERANCE
    pairs, dim = x.shape[0] - lag, x.shape[1]
    bound = contract if pairs >= 100 * dim else max(contract, few_rows)
    sides = {"x": x[:pairs], "y": x[lag:]}
    step = BLOCK[x.device.type] // dim + 1  # in blocks: x can be half of the memory that there is
    means = {name: sum(part.double().sum(0) for part in side.split(step)) / pairs for name, side in sides.items()}
    expected = {name: torch.zeros(dim, dim, dtype=torch.float64, device=x.device) for name in result}
    squares = dict.fromkeys("xy", 0.0)
    for blocks in zip(*(side.split(step) for side in sides.values()), strict=True):
        centred = {name: block.double() - means[name] for name, block in zip(sides, blocks, strict=True)}
        squares = {side: squares[side] + float(centred[side].square().sum()) for side in "xy"}
        for name in result:
            expected[name] += centred[name[0]].T @ centred[name[1]]
    wrong, kept = [], True
    for name, value in result.items():
        size = (squares[name[0]] * squares[name[1]]) ** 0.5 / (pairs - 1) / dim**0.5
        expected[name] /= pairs - 1
        error = float((torch.as_tensor(value).to(expected[name]) - expected[name]).norm() / size)
        kept &= error <= contract
        if not error <= (bound if strict else TOLERANCE):
            wrong.append(f"{name} is off by {error:.1e}")
    return Check("; ".join(wrong), contract=kept, checked_rows=x.shape[0])


def check_indices(x: Tensor, codebook: Tensor, indices: Tensor, *, strict: bool) -> Check:
    """Mismatch rate and regret of a lookup; x (N, D), codebook (K, D), indices (N,) in range."""
    (rows, dim), codes = x.shape, codebook.double()
    budget = int(MACS[x.device.type] // codebook.numel())
    step = -(-rows // max(1, min(rows, budget)))
    x, indices = x[::step], indices[::step]
    rows = x.shape[0]
    center = codes.mean(0)
    shifted = codes - center  # a smaller norm, a smaller rounding error of the expanded square
    half_norms = shifted.square().sum(1) / 2
    max_norm, max_shifted = codes.norm(dim=1).amax(), shifted.norm(dim=1).amax()
    wrong, max_regret, contract, sane = 0, 0.0, True, True
    length = max(1, BLOCK[x.device.type] // codebook.shape[0])
    for start in range(0, rows, length):
        block = slice(start, start + length)
        values = x[block].double()
        best = (half_norms - (values - center) @ shifted.T).argmin(1)
        smallest = (values - codes[best]).square().sum(1)
        regret = ((values - codes[indices[block]]).square().sum(1) - smallest).clamp(min=0)
        norm, moved = values.norm(dim=1), (values - center).norm(dim=1)
        if x.dtype == torch.float32:
            product = (2.0**-21 + dim * 2.0**-24) * moved * max_shifted
            bound = 8 * product + 2.0**-22 * (moved.square() + max_shifted.square())
        else:
            bound = 8 * dim * 2.0**-24 * norm * max_norm
        wrong += int(((best != indices[block]) & (regret > 0)).sum())
        max_regret = max(max_regret, float((regret / smallest.clamp(min=1e-300)).max()))
        contract &= bool((regret <= bound).all())
        sane &= bool((regret <= SANITY * (norm * max_norm + max_norm.square())).all())
    error = ""
    if not sane or (strict and not contract):
        limit = "the numerics contract" if strict else "any rounding"
        error = f"wrong codes beyond {limit}: {wrong} of {rows} rows, regret up to {max_regret:.1e} of the distance"
    return Check(error, wrong / rows, max_regret, contract, rows)


def _errors(x: Tensor, codebook: Tensor, indices: Tensor, got: Mapping[str, Tensor]) -> list[tuple[str, float]]:
    """Each output's largest error against fp64 for these indices, in units of what is tolerated."""
    num_codes, (rows, dim) = codebook.shape[0], x.shape
    tolerance = TOLERANCE if x.dtype == torch.float32 else 2.0**-7
    values, codes = x.double(), codebook.double()
    quantized = codes[indices]
    counts = torch.bincount(indices, minlength=num_codes)

    def sum_by_code(terms: Tensor) -> Tensor:
        return torch.zeros_like(codes).index_add_(0, indices, terms)

    def error(name: str, expected: Tensor, scale: Tensor) -> tuple[str, float]:
        difference = (got[name].double().reshape(expected.shape) - expected).abs()
        return name, float((difference / (tolerance * scale).clamp(min=1e-30)).nan_to_num(nan=torch.inf).max())

    found = []
    if "quantized" in got:
        found.append(error("quantized", quantized, quantized.abs().amax() + values.abs().amax()))
    if "loss" in got:
        loss = (values - quantized).square().mean()
        found.append(error("loss", loss, loss))
    if "counts" in got:
        found.append(("counts", 0.0 if torch.equal(got["counts"].reshape(-1).long(), counts) else torch.inf))
    sums, magnitude = sum_by_code(values), sum_by_code(values.abs())
    if "sums" in got:
        # sums may be n·c plus the sum of x − c, whose rounding is in proportion to the code
        found.append(error("sums", sums, magnitude + counts[:, None] * codes.abs()))
    if "grad_x" in got:
        grad = (2 * quantized + 2 * (values - quantized)) / (rows * dim)
        found.append(error("grad_x", grad, (quantized.abs().amax() + values.abs().amax()) / (rows * dim)))
    if "codebook" in got:
        size = DECAY + (1 - DECAY) * counts
        smoothed = ((size + EPS) * size.sum() / (size.sum() + num_codes * EPS))[:, None]
        updated = (DECAY * codes + (1 - DECAY) * sums) / smoothed
        found.append(error("codebook", updated, (DECAY * codes.abs() + (1 - DECAY) * magnitude) / smoothed))
    return found
