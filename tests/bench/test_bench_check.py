"""The check before timing has to catch a provider that is wrong, and to pass one that is right."""

import sys
import types

import pytest
import torch
from lamkernels.bench.check import check
from lamkernels.bench.providers import PROVIDERS
from lamkernels.bench.workloads import OPS, Workload, make_inputs


def run(name, op, dtype="float32", n=300, k=7, d=5):
    workload = Workload("custom", op, n, k, d, dtype)
    inputs = make_inputs(workload, "cpu", threads=1)
    return workload, inputs, PROVIDERS[name].prepare[op](workload, inputs)(0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["reference", "eager", "vqp", "faiss", "sklearn", "onedal", "cdist", "deeptime"])
def test_providers_pass(name, op):
    if op not in PROVIDERS[name].prepare:
        pytest.skip(f"{name} has no {op}")
    if reason := PROVIDERS[name].absent("cpu"):
        pytest.skip(reason)
    # a covariance of fp32 sums is as right as a peer's can be
    verdict = check(*run(name, op), strict=op != "covariance" or name == "reference")
    assert verdict.error == ""
    if op == "covariance":
        assert verdict.checked_rows == 300 and (verdict.contract or name != "reference")
    elif op != "code_statistics":
        assert verdict.checked_rows == 300 and verdict.mismatch_rate == 0 and verdict.contract


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_meets_the_contract(dtype):
    assert check(*run("eager", "nearest_code", dtype), strict=True).error == ""


@pytest.mark.parametrize("op", OPS)
def test_every_spoiled_output_is_named(op):
    workload, inputs, result = run("reference", op)
    for name in result:
        if name == "indices":
            continue
        spoiled = result[name].detach().clone()
        spoiled.view(-1)[-1] += 1 if name == "counts" else 0.1 * spoiled.abs().max() + 1e-3
        verdict = check(workload, inputs, {**result, name: spoiled}, strict=False)
        assert verdict.error.startswith(f"{name} is off by"), name


def test_nan_is_no_agreement():
    workload, inputs, result = run("reference", "vector_quantize")
    result["sums"] = torch.full_like(result["sums"], torch.nan)
    assert "sums" in check(workload, inputs, result, strict=False).error


def test_one_wrong_code_in_a_thousand_is_seen():
    workload, inputs, result = run("reference", "nearest_code", n=1000)
    result["indices"][17] = (result["indices"][17] + 1) % workload.K
    verdict = check(workload, inputs, result, strict=True)
    assert verdict.mismatch_rate == 0.001 and not verdict.contract and verdict.max_regret > 0
    assert "wrong codes" in verdict.error


@pytest.mark.parametrize("strict", [True, False])
def test_random_codes_are_wrong_for_peers_too(strict):
    workload, inputs, result = run("reference", "nearest_code")
    verdict = check(workload, inputs, {"indices": result["indices"].roll(1)}, strict=strict)
    assert "wrong codes" in verdict.error and verdict.mismatch_rate > 0.5


def test_rounding_of_a_peer_is_reported_and_allowed():
    workload = Workload("custom", "nearest_code", 20000, 64, 16)
    inputs = make_inputs(workload, "cpu")
    rounded = torch.cdist(inputs.x[0].bfloat16().double(), inputs.codebook.double()).argmin(1)
    peer = check(workload, inputs, {"indices": rounded}, strict=False)
    assert peer.error == "" and 0 < peer.mismatch_rate < 0.05 and peer.contract is False
    assert "numerics contract" in check(workload, inputs, {"indices": rounded}, strict=True).error


def test_equal_codes_are_no_mismatch():
    workload, inputs, result = run("reference", "nearest_code")
    codebook = torch.cat([inputs.codebook, inputs.codebook])
    inputs = inputs._replace(codebook=codebook)
    workload = Workload("custom", "nearest_code", 300, 14, 5)
    assert check(workload, inputs, {"indices": result["indices"] + 7}, strict=True).mismatch_rate == 0


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_out_of_range_is_wrong(index):
    workload, inputs, result = run("reference", "nearest_code")
    result["indices"][3] = index
    assert "outside" in check(workload, inputs, result, strict=False).error


def test_missing_rows_are_wrong():
    workload, inputs, result = run("reference", "nearest_code")
    assert "299 indices" in check(workload, inputs, {"indices": result["indices"][1:]}, strict=False).error


def test_the_gpu_libraries_are_called_as_they_are_declared(monkeypatch):
    def assign(x, centroids, x_sq=None, out=None, c_sq=None, **options):  # FlashLib leaves x_sq out
        torch.testing.assert_close(c_sq, centroids.square().sum(-1))
        if x_sq is not None:
            torch.testing.assert_close(x_sq, x.square().sum(-1))
        return out.copy_(torch.cdist(x, centroids).argmin(-1))

    modules = {
        "flash_kmeans.assign_euclid_triton": {"euclid_assign_triton": assign},
        "flashlib.primitives.kmeans.triton.assign": {"euclid_assign_triton": assign},
        "flashlib.linalg.cov_gemm": {"cov_gemm": lambda x: x.T @ x},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    monkeypatch.setitem(sys.modules, "cutlass", None)  # importing it fails
    for name in ("flash-kmeans", "flashlib"):
        assert check(*run(name, "nearest_code"), strict=True).error == ""
    asking = types.SimpleNamespace(euclid_assign_triton=lambda x, codes, x_sq, **more: assign(x, codes, x_sq, **more))
    monkeypatch.setitem(sys.modules, "flashlib.primitives.kmeans.triton.assign", asking)  # as some versions declare it
    assert check(*run("flashlib", "nearest_code"), strict=True).error == ""
    assert check(*run("flashlib", "covariance", k=0), strict=False).error == ""
    with pytest.raises(NotImplementedError, match="lagged"):
        run("flashlib", "covariance")
