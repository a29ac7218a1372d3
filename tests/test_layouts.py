from __future__ import annotations

import pytest
import torch
from layout_cases import CASES, LAYOUTS, D, K, assert_read_in_place
from torch.profiler import ProfilerActivity, profile

import lamkernels as lk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("metric", "gradient"), CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_read_where_they_lie(name, metric, gradient, dtype, backend):
    assert_read_in_place(name, metric, gradient, backend, dtype, "cpu")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("codes", [K, 20000], ids=["sums by chunk", "sums in a pass of their own"])
def test_nothing_copies_the_rows(name, codes):
    x = LAYOUTS[name](torch.float32).requires_grad_()
    codebook = torch.randn(*([2] if name == "LAPO" else []), codes, D)
    lk.vector_quantize(x, codebook, backend="numba")  # compiles
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        out = lk.vector_quantize(x, codebook, backend="numba")
        torch.autograd.grad(out.quantized.sum() + out.commitment_loss, x)  # .grad would be in the layout of x
        lk.nearest_code(x, codebook, backend="numba")
    copies = [
        (event.name, event.input_shapes)
        for event in trace.events()
        if event.name in ("aten::copy_", "aten::clone", "aten::contiguous")
        and any(torch.Size(shape).numel() == x.numel() for shape in event.input_shapes if shape)
    ]
    assert not copies


def test_compiled_code_reads_groups_too():
    x, codebook = LAYOUTS["channels first"](torch.float32), torch.randn(K, D)

    def quantize(x):
        return lk.vector_quantize(x, codebook).quantized

    compiled = torch.compile(quantize, fullgraph=True, dynamic=True)
    for rows in (x, LAYOUTS["channels first"](torch.float32)[:2], x.contiguous()):
        assert torch.equal(compiled(rows), quantize(rows))


def test_a_large_codebook_sums_rows_where_they_lie():
    assert_read_in_place("LAPO", "l2", "ste", "numba", torch.float32, "cpu", codes=20000)
