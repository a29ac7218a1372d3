"""No N×K anywhere: the peak of a fresh process, at a shape whose score matrix would take 8 GiB."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch, lamkernels as lk
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
lk.vector_quantize(torch.randn(8, 32), torch.randn(8192, 32))  # compiled, prepared
x, codebook = torch.randn(262144, 32), torch.randn(8192, 32)
before = peak()
if sys.argv[1] == "vector_quantize":
    out = lk.vector_quantize(x, codebook)
    outputs = sum(t.numel() * t.element_size() for t in out)
else:
    indices = lk.nearest_code(x, codebook)
    outputs = indices.numel() * 8
print(peak() - before - outputs)
"""


@pytest.mark.slow
@pytest.mark.parametrize("function", ["nearest_code", "vector_quantize"])
def test_peak_extra_memory(function):
    result = subprocess.run([sys.executable, "-c", PROBE, function], capture_output=True, text=True, check=True)
    extra, rows, codebook = int(result.stdout), 262144 * 4, 8192 * 32 * 4
    assert extra <= 8 * rows + 16 * codebook, f"{extra / 2**20:.1f} MiB beside the outputs"


MOMENTS = """
import resource, sys, torch, lamkernels as lk
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
options = {"lag": 1} if sys.argv[1] == "lagged" else {}
lk.moments(torch.randn(8192, 64), **options)  # compiled
x = torch.randn(1_000_000, 64)
before = peak()
lk.moments(x, **options)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "lagged"])
def test_covariances_need_no_second_copy_of_their_rows(kind):
    result = subprocess.run([sys.executable, "-c", MOMENTS, kind], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 24 * 2**20, f"{int(result.stdout) / 2**20:.1f} MiB beside 244 MiB of rows"
