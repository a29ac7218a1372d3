"""Estimates: the model's numbers worked out by hand, published peaks, and nothing that needs a GPU or a compiler."""

import csv
import json
import subprocess
import sys

import pytest
from lamkernels.bench import cli, estimate
from lamkernels.bench.peaks import Peaks
from lamkernels.bench.workloads import OPS, Workload, select

BY_HAND = {  # at N=1000, K=10, D=4 in fp32: bytes, flops, bytes in use at once
    # x 16 000, codebook 160, indices 8 000; 2·N·K·D
    "nearest_code": (24_160, 80_000, 24_160),
    # x and q, codebook, indices, counts 80 and sums 160; N·D for the sums and 3·N·D for the loss; two losses of 4 bytes
    "vector_quantize": (40_400, 96_000, 40_408),
    # q twice and its gradient written, then x, q and that gradient read and dx written; 3 × 240 for the averages;
    # kept: the gradient of q, dx, and the averages of 160 and 40 bytes
    "train_step": (153_120, 120_000, 72_608),
    "code_statistics": (24_240, 4_000, 24_240),
    # x, and three matrices of 4×4 in fp64; D² per row for the plain one and 2·D² for the lagged one
    "covariance": (16_384, 48_000, 16_384),
}


@pytest.mark.parametrize("op", OPS)
def test_every_op_costs_what_a_hand_counts(op):
    found = estimate.estimate(Workload("custom", op, 1000, 10, 4), "H200")
    assert (found.bytes, found.flops, found.peak_bytes) == BY_HAND[op]
    assert found.bound == "memory" and found.fits
    assert found.microseconds == pytest.approx(found.bytes / 4.8e12 * 1e6)


def test_products_count_against_the_rate_of_their_type():
    single, half = (Workload("custom", "nearest_code", 2**20, 1024, 64, dtype) for dtype in ("float32", "bfloat16"))
    assert estimate.estimate(half, "H200").microseconds == pytest.approx(2**37 / 989.4e6)
    assert estimate.estimate(single, "H200").microseconds == pytest.approx(2**37 / (494.7e6 / 3))  # three TF32 products
    assert estimate.estimate(single, "RTX 4090").microseconds == pytest.approx(
        2**37 / 82.6e6
    )  # where plain fp32 is faster
    rows = Workload("custom", "covariance", 2**20, 0, 4096)  # three products of halves
    assert estimate.estimate(rows, "H200").microseconds == pytest.approx(2**44 / (989.4e6 / 3))
    assert estimate.estimate(half, "H200").bound == "compute"
    assert estimate.estimate(half, "H200").score_matrix_bytes == 2**32


def test_the_targets_take_what_a_hand_counts():
    """µs at the rates measured on an H200: a copy 4.3 TB/s, halves 790 TF/s, three products of them 228."""
    bandwidth, half, three = 4.3e6, 790e6, 228e6
    by_hand = {  # rows and codes in, indices of 8 bytes out; or 2·N·K·D
        (1048576, 8, 16): (1048576 * (2 * 16 + 8) + 2 * 8 * 16) / bandwidth,
        (273000, 64, 16): (273000 * (2 * 16 + 8) + 2 * 64 * 16) / bandwidth,
        (1048576, 64, 64): (1048576 * (2 * 64 + 8) + 2 * 64 * 64) / bandwidth,
        (1048576, 256, 128): 2 * 1048576 * 256 * 128 / half,
        (1048576, 1024, 64): 2 * 1048576 * 1024 * 64 / half,
        (262144, 8192, 256): 2 * 262144 * 8192 * 256 / half,
        (1048576, 65536, 128): 2 * 1048576 * 65536 * 128 / half,
        # rows in and out, codebook, indices, counts and sums
        (1048576, 16, 128): (1048576 * (2 * 4 * 128 + 8) + 4 * 16 * 128 + 8 * 16 + 4 * 16 * 128) / bandwidth,
        (1000000, 0, 64): (1000000 * 4 * 64 + 8 * 64**2) / bandwidth,  # one triangle: N·D²
        (5000000, 0, 2048): 5000000 * 2048**2 / three,
    }
    floors = (9, 3, 32, 87, 174, 1.4e3, 22e3, 251, 60, 92e3)
    targets = {(w.N, w.K, w.D): w for w in select(["targets"], OPS, "cuda")}
    assert targets.keys() == by_hand.keys()
    for (shape, expected), floor in zip(by_hand.items(), floors, strict=True):
        rate = three if targets[shape].op == "covariance" else half
        found = Peaks(bandwidth * 1e6, rate * 1e6).seconds(targets[shape].bytes, targets[shape].flops) * 1e6
        assert found == pytest.approx(expected, rel=1e-12)
        assert found == pytest.approx(floor, abs=1.2, rel=0.015)  # whole microseconds, smaller indices


def test_names_are_forgiving_and_unknown_ones_listed(capsys):
    assert estimate.device_name("nvidia rtx-4090") == "RTX 4090" and estimate.device_name("mi300x") == "MI300X"
    with pytest.raises(SystemExit) as stop:
        cli.main(["--estimate", "V100"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "no published peaks of 'V100'; known are A10, A100, " in error and "H200" in error


def test_what_does_not_fit_says_so(tmp_path, capsys):
    argv = ["--estimate", "L4", "--op", "vector_quantize", "--shape", "50000000,8,128", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    assert "does not fit" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "estimate.json").read_text())["estimates"]
    (line,) = csv.DictReader((tmp_path / "estimate.csv").read_text().splitlines())
    assert row["fits"] is False and int(line["peak_bytes"]) == row["peak_bytes"] > 24e9
    with pytest.raises(SystemExit):
        cli.main(["--estimate", "L4", "--plot", "x.png"])


def test_an_estimate_needs_no_compiler():
    code = """
import sys
sys.modules["numba"] = sys.modules["triton"] = None  # importing them fails
from lamkernels.bench.cli import main
sys.exit(main(["--estimate", "H200", "--suite", "moments,memory"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "covariance N=20000 K=1 D=2048 float32" in done.stdout and "compute" in done.stdout
