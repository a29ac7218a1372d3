"""The contestants of "covariance": the workload's K is the lag, 0 for none. All give covariances, over P − 1 pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamkernels.covariance import Covariance
from lamkernels.joint_moments import moments

from .workloads import Inputs, Workload

BATCH = 4096  # rows of an update
Run = Callable[[int], dict[str, Any]]


def ours(backend: Any) -> Callable[[Workload, Inputs], Run]:
    """lamkernels.moments on a backend."""

    def covariance(workload: Workload, inputs: Inputs) -> Run:
        pairs, lag = workload.N - workload.K, workload.K or None

        def run(i: int) -> dict[str, Any]:
            found = moments(inputs.x[i], lag=lag, backend=backend)._asdict()
            return {name: found[name] / (pairs - 1) for name in ("xx", "xy", "yy") if found[name] is not None}

        return run

    return covariance


def streamed(backend: Any) -> Callable[[Workload, Inputs], Run]:
    """lamkernels.Covariance, fed in batches."""

    def covariance(workload: Workload, inputs: Inputs) -> Run:
        def run(i: int) -> dict[str, Any]:
            accumulator = Covariance(workload.D, lag=workload.K or None, backend=backend)
            for rows in inputs.x[i].split(BATCH):
                accumulator.update(rows)
            found = {"xx": accumulator.covariance()}
            if workload.K:
                found |= {"xy": accumulator.cross_covariance(), "yy": accumulator.covariance_y()}
            return found

        return run

    return covariance


def eager(workload: Workload, inputs: Inputs) -> Run:
    """torch.cov; with a lag, products of centred rows."""
    lag, pairs = workload.K, workload.N - workload.K

    def plain(i: int) -> dict[str, Any]:
        return {"xx": torch.cov(inputs.x[i].T)}

    def lagged(i: int) -> dict[str, Any]:
        a, b = inputs.x[i][:-lag], inputs.x[i][lag:]
        a, b = a - a.mean(0), b - b.mean(0)
        return {name: p.T @ q / (pairs - 1) for name, p, q in (("xx", a, a), ("xy", a, b), ("yy", b, b))}

    return lagged if lag else plain


def deeptime(workload: Workload, inputs: Inputs) -> Run:
    """deeptime's covariance estimator, the standard for time-lagged data."""
    from deeptime.covariance import Covariance

    rows, lag = [x.numpy() for x in inputs.x], workload.K

    def run(i: int) -> dict[str, Any]:
        if not lag:
            estimator = Covariance(compute_c0t=False, compute_ctt=False, remove_data_mean=True)
            return {"xx": estimator.partial_fit(rows[i]).fetch_model().cov_00}
        estimator = Covariance(lagtime=lag, compute_c0t=True, compute_ctt=True, remove_data_mean=True)
        model = estimator.fit(rows[i]).fetch_model()
        return {"xx": model.cov_00, "xy": model.cov_0t, "yy": model.cov_tt}

    return run
