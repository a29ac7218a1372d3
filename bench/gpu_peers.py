"""The k-means libraries for GPUs, through the functions that their own loops call."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .workloads import Inputs, Workload

Run = Callable[[int], dict[str, Any]]


def flash_kmeans(workload: Workload, inputs: Inputs) -> Run:
    """flash-kmeans' assignment (0.3.1: squared norms of rows are an argument, and belong to the data)."""
    assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    codes, code_norms = inputs.codebook[None], _norms(inputs.codebook)
    norms, out = [_norms(x) for x in inputs.x], _indices(workload, inputs)
    return lambda i: {"indices": assign(inputs.x[i][None], codes, norms[i], out=out, c_sq=code_norms)}


def flashlib_assign(workload: Workload, inputs: Inputs) -> Run:
    """FlashLib's assignment: for Hopper in CuTe, which picks the tile by trying; elsewhere, or for fp32, in Triton."""
    kmeans = "flashlib.primitives.kmeans"
    try:
        importlib.import_module("cutlass")
        assign = importlib.import_module(f"{kmeans}.cutedsl.assign").cutedsl_assign_euclid
    except ImportError:  # its optional dependency
        assign = importlib.import_module(f"{kmeans}.triton.assign").euclid_assign_triton
    codes, code_norms, out = inputs.codebook[None], _norms(inputs.codebook), _indices(workload, inputs)
    norms = inspect.signature(assign).parameters.get("x_sq")  # some versions ask for those of rows
    more = [() if norms is None or norms.default is None else (_norms(x),) for x in inputs.x]
    return lambda i: {"indices": assign(inputs.x[i][None], codes, *more[i], out=out, c_sq=code_norms)}


def flashlib_covariance(workload: Workload, inputs: Inputs) -> Run:
    """FlashLib's product of tall matrices, on centred rows as its PCA calls it; with a lag it has no like."""
    if workload.K:
        raise NotImplementedError("FlashLib has no lagged covariance")
    product = importlib.import_module("flashlib.linalg.cov_gemm").cov_gemm

    def run(i: int) -> dict[str, Any]:
        x = inputs.x[i]
        return {"xx": product(x - x.mean(0)) / (workload.N - 1)}

    return run


def _norms(rows: Tensor) -> Tensor:
    return rows.float().square().sum(1)[None]


def _indices(workload: Workload, inputs: Inputs) -> Tensor:
    return torch.empty(1, workload.N, dtype=torch.int32, device=inputs.codebook.device)
