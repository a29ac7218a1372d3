"""The models and the registry: known counts, and no workload without an entry."""

import pytest
import torch
from lamkernels.bench.peaks import Peaks
from lamkernels.bench.workloads import CODE_OPS, SUITES, WORKLOADS, Workload, make_inputs, select


def test_lookup_model_counts_each_byte_and_product_once():
    workload = Workload("custom", "nearest_code", N=1000, K=10, D=4)
    assert workload.flops == 2 * 1000 * 10 * 4
    assert workload.bytes == 4 * 1000 * 4 + 4 * 10 * 4 + 8 * 1000
    assert workload.score_matrix_bytes == 4 * 1000 * 10


def test_half_precision_halves_the_rows_and_not_the_indices():
    single, half = (Workload("custom", "nearest_code", 1000, 10, 4, dtype) for dtype in ("float32", "bfloat16"))
    assert single.bytes - half.bytes == 2 * (1000 * 4 + 10 * 4)


def test_forward_model_adds_output_losses_and_statistics():
    lookup, forward, step = (Workload("custom", op, 1000, 10, 4) for op in CODE_OPS[:3])
    assert forward.flops - lookup.flops == (1 + 3) * 1000 * 4
    assert forward.bytes - lookup.bytes == 4 * 1000 * 4 + 8 * 10 + 4 * 10 * 4
    assert step.bytes - forward.bytes == 7 * 4 * 1000 * 4 + 3 * (8 * 10 + 4 * 10 * 4)
    assert Workload("custom", "code_statistics", 1000, 10, 4).flops == 1000 * 4


@pytest.mark.parametrize("op", ["nearest_code", "vector_quantize"])
def test_output_bytes_are_those_of_the_real_outputs(op):
    import lamkernels

    workload = Workload("custom", op, 100, 5, 3)
    inputs = make_inputs(workload, "cpu")
    outputs = getattr(lamkernels, op)(inputs.x[0], inputs.codebook, backend="reference")
    tensors = [outputs] if op == "nearest_code" else [t for t in outputs if t is not outputs.codebook_loss]
    real = sum(t.numel() * t.element_size() for t in tensors)
    assert abs(workload.output_bytes - real) <= 4  # the losses


def test_a_lagged_covariance_adds_a_full_product():
    plain, lagged = (Workload("moments", "covariance", 1000, lag, 10) for lag in (0, 1))
    assert plain.flops == 1000 * 10 * 10 and lagged.flops == 3 * plain.flops
    assert plain.bytes == 4 * 1000 * 10 + 8 * 10 * 10


def test_roofline_takes_the_nearer_ceiling():
    peaks = Peaks(bandwidth=100.0, flops=10.0)
    assert peaks.seconds(bytes_moved=500, flops=10) == 5.0
    assert peaks.seconds(bytes_moved=100, flops=30) == 3.0


def test_suites_hold_the_promised_sizes():
    def shapes(suite, device):
        return {(w.N, w.K, w.D) for w in select([suite], ["nearest_code"], device)}

    promised = {(65536, 8, 32), (65536, 64, 16), (262144, 16, 128), (65536, 1024, 64), (16384, 8192, 256)}
    assert shapes("tokenizer", "cpu") == promised
    assert shapes("tokenizer", "cuda") == promised
    assert (1048576, 65536, 128) in shapes("targets", "cuda") and not shapes("targets", "cpu")
    assert select(["targets"], ["covariance"], "cuda")[-1].row_bytes == 4 * 5_000_000 * 2048
    assert shapes("memory", "cpu") == {(262144, 8192, 32)}
    assert {w.suite for w in WORKLOADS} == set(SUITES)
    assert {w.op for w in WORKLOADS if w.suite == "lam"} == set(CODE_OPS)


def test_given_shapes_replace_those_of_the_suite():
    (workload,) = select(["lam"], ["nearest_code"], "cpu", [(7, 3, 2)], "float16")
    assert workload == Workload("custom", "nearest_code", 7, 3, 2, "float16")
    assert select(["memory"], ["nearest_code"], "cpu", [(7, 3, 2)])[0].measure == "memory"


def test_every_process_gets_the_same_inputs():
    workload = Workload("custom", "nearest_code", 50, 3, 2)
    one, two = (make_inputs(workload, "cpu", buffers=2) for _ in range(2))
    assert torch.equal(one.x[1], two.x[1]) and torch.equal(one.codebook, two.codebook)
    assert not torch.equal(one.x[0], one.x[1])
