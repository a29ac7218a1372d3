"""The CPU kernels keep the contract with narrower vectors than this machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

numba = pytest.importorskip("numba")
HERE = Path(__file__).parent
TARGETS = {  # bits: what Numba compiles for
    128: {"NUMBA_CPU_NAME": "ivybridge", "NUMBA_CPU_FEATURES": "+avx,+f16c,+popcnt,+sse4.2"},
    256: {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("bits", TARGETS)
def test_the_contract_holds(bits):
    from lamkernels.ops import simd

    if bits >= simd.BITS:
        pytest.skip(f"the vectors here have {simd.BITS} bits, which all other tests use")
    environment = {**os.environ, **TARGETS[bits], "LAMKERNELS_TEST_BITS": str(bits)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        f"numba and not bfloat16 and not float64{' and not float16' if bits == 128 else ''}",
    ]
    # fewer dtypes where the machines are rare: the time goes into compiling, a dtype at a time
    for file, names in (
        ("test_nearest_code.py", ("test_hard_data", "test_every_row_gets_its_nearest_code")),
        ("test_vector_quantize.py", ("test_outputs_and_gradients", "test_rows_that_are_not_finite_are_in_nothing")),
        ("test_moments.py", ("test_any_shape_layout_dtype_weight_and_lag", "test_hard_data")),
        ("test_vector_width.py", ("test_the_width_is_the_one_asked_for",)),
    ):
        nodes = [f"{HERE / file}::{name}" for name in names]
        selected = command if "width" not in file else [part for part in command if part not in ("-k", command[-1])]
        done = subprocess.run([*selected, *nodes], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.skipif("LAMKERNELS_TEST_BITS" not in os.environ, reason="run by the test above")
def test_the_width_is_the_one_asked_for():
    from lamkernels.ops import simd

    assert str(simd.BITS) == os.environ["LAMKERNELS_TEST_BITS"]
