"""Relative Frobenius errors of covariances against fp64, on the data of docs/numerics.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lamkernels.joint_moments import moments

ROWS, DIM, BATCH = 200_000, 64, 10_000
Estimate = Callable[[Tensor], Tensor]  # rows (N, D) -> their covariance over N − 1


class Outcome(NamedTuple):
    """``error``: of ``estimator`` on ``data``, relative, Frobenius."""

    data: str
    estimator: str
    error: float


def _two_values(mean: float) -> Callable[[], Tensor]:
    return lambda: mean + 0.65 * (torch.randint(0, 2, (ROWS, DIM)) - 0.5)


DATA: dict[str, Callable[[], Tensor]] = {
    "normal, mean 0": lambda: torch.randn(ROWS, DIM),
    "normal, mean 10": lambda: 10 + torch.randn(ROWS, DIM),
    "normal, mean 1000": lambda: 1000 + torch.randn(ROWS, DIM),
    "pixels k/255": lambda: torch.randint(0, 256, (ROWS, DIM)).float() / 255,
    "fp16, mean 3": lambda: (3 + torch.randn(ROWS, DIM)).half(),
    "bf16, mean 10": lambda: (10 + torch.randn(ROWS, DIM)).bfloat16(),
    "two values, mean 0.8": _two_values(0.8),
    "two values, mean 10": _two_values(10),
    "two values, mean 1000": _two_values(1000),
}


def _expanded(x: Tensor) -> Tensor:
    rows = x.float()
    total = rows.sum(0)
    return (rows.T @ rows - torch.outer(total, total) / len(rows)) / (len(rows) - 1)


def _incremental_pca(x: Tensor) -> Tensor:
    from sklearn.decomposition import IncrementalPCA

    fitted = IncrementalPCA(batch_size=BATCH).fit(x.float().numpy())
    components, variance = (
        torch.from_numpy(part).double() for part in (fitted.components_, fitted.explained_variance_)
    )
    return components.T @ (variance[:, None] * components)


def _deeptime(x: Tensor) -> Tensor:
    from deeptime.covariance import Covariance

    estimator = Covariance(compute_c0t=False, compute_ctt=False, remove_data_mean=True)
    return torch.from_numpy(estimator.partial_fit(x.float().numpy()).fetch_model().cov_00)


ESTIMATORS: dict[str, tuple[Estimate, str]] = {  # and the package that it needs
    "moments": (lambda x: moments(x).xx / (len(x) - 1), "torch"),
    '"exact"': (lambda x: moments(x, precision="exact").xx / (len(x) - 1), "torch"),
    "torch.cov": (lambda x: torch.cov(x.float().T), "torch"),
    "IncrementalPCA": (_incremental_pca, "sklearn"),
    "Σxxᵀ − N x̄x̄ᵀ": (_expanded, "torch"),
    "deeptime": (_deeptime, "deeptime"),
}


def outcomes(data: Sequence[str] = tuple(DATA), seed: int = 0) -> list[Outcome]:
    """Every estimator that is installed on every set."""
    found = []
    for name in data:
        torch.manual_seed(seed)
        x = DATA[name]()
        rows = x.double()
        centred = rows - rows.mean(0)
        exact = centred.T @ centred / (len(x) - 1)
        for estimator, (estimate, package) in ESTIMATORS.items():
            if importlib.util.find_spec(package) is not None:
                error = (estimate(x).double() - exact).norm() / exact.norm()
                found.append(Outcome(name, estimator, float(error)))
    return found


def table(found: Sequence[Outcome]) -> str:
    """Markdown: a row for each set, a column for each estimator."""
    estimators = list(dict.fromkeys(outcome.estimator for outcome in found))
    lines = [f"| data | {' | '.join(estimators)} |", "|---" * (1 + len(estimators)) + "|"]
    for data in dict.fromkeys(outcome.data for outcome in found):
        cells = [f"{outcome.error:.1e}" for outcome in found if outcome.data == data]
        lines.append(f"| {data} | {' | '.join(cells)} |")
    return "\n".join(lines)
