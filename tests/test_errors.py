"""A wrong argument gives one line that names it, says what it was and what is allowed."""

from __future__ import annotations

import pytest
import torch

import lamkernels as lk

X, C = torch.randn(10, 4), torch.randn(3, 4)
INDICES = torch.zeros(10, dtype=torch.int64)

CASES = [
    (lambda: lk.nearest_code([1.0], C), TypeError, r"x is a list.*torch.Tensor"),
    (lambda: lk.nearest_code(X.int(), C), TypeError, r"x is torch.int32.*float32, float16, bfloat16 or float64"),
    (lambda: lk.nearest_code(X, C.double()), TypeError, r"codebook is torch.float64 and x is torch.float32"),
    (lambda: lk.nearest_code(X, C.half()), TypeError, r"codebook is torch.float16 and x is torch.float32"),
    (lambda: lk.nearest_code(torch.tensor(1.0), C), ValueError, r"x is a scalar.*\(\.\.\., D\)"),
    (lambda: lk.nearest_code(X, C[:, :3]), ValueError, r"x has rows of 4 and codebook of 3 entries"),
    (lambda: lk.nearest_code(X, C[0]), ValueError, r"codebook has shape \(4,\).*\(K, D\) or \(H, K, D\)"),
    (lambda: lk.nearest_code(X, C[:0]), ValueError, r"codebook has shape \(0, 4\).*at least 1"),
    (lambda: lk.nearest_code(X, C.expand(2, 3, 4)), ValueError, r"x has shape \(10, 4\).*\(2, \.\.\., 4\)"),
    (lambda: lk.nearest_code(X, C, metric="l1"), ValueError, r"metric is 'l1'.*'l2', 'cosine', 'dot'"),
    (lambda: lk.nearest_code(X, C, precision="high"), ValueError, r"precision is 'high'.*'default', 'exact', 'fast'"),
    (lambda: lk.nearest_code(X, C, backend="cpp"), ValueError, r"backend is 'cpp'.*'auto', 'reference', 'numba'"),
    (lambda: lk.nearest_code(X, C.to("meta")), ValueError, r"x is on cpu and codebook on meta"),
    (lambda: lk.nearest_code(X, C, backend="cuda"), RuntimeError, "backend 'cuda' cannot run here: "),
    (lambda: lk.vector_quantize(X, C, gradient="gumbel"), ValueError, r"gradient is 'gumbel'.*'ste'"),
    (lambda: lk.vector_quantize(X, C, gradient="noise", noise=X[:4]), ValueError, r"noise is \(4, 4\).*\(10, 4\)"),
    (
        lambda: lk.vector_quantize(X, C, gradient="noise", noise=X, generator=torch.Generator()),
        ValueError,
        r"noise and generator are both given",
    ),
    (lambda: lk.nearest_code(X.to_sparse(), C), TypeError, r"x has layout torch.sparse_coo"),
    (lambda: lk.nearest_code(X, C.expand(0, 3, 4)), ValueError, r"codebook has shape \(0, 3, 4\)"),
    (lambda: lk.code_statistics(X[:, :0], INDICES, 3), ValueError, r"x has shape \(10, 0\)"),
    (lambda: lk.code_statistics(X, INDICES, 3.5), TypeError, r"num_codes is 3.5; it must be an int"),
    (lambda: lk.LFQ(4, entropy_loss_weight=float("nan")), ValueError, r"entropy_loss_weight is nan.*finite"),
    (lambda: lk.LFQ(4.0), TypeError, r"dim is 4.0; it must be an int"),
    (lambda: lk.SimVQ(4.0, 8), TypeError, r"dim is 4.0; it must be an int"),
    (lambda: lk.VectorQuantize(4, 8, eps=float("inf")), ValueError, r"eps is inf; it must be positive and finite"),
    (lambda: lk.finite_scalar_quantize(X, [2**40, 2, 2, 2]), ValueError, r"each in \[2, 65536\]"),
    (lambda: lk.VectorQuantize(4.5, 8), TypeError, r"dim is 4.5; it must be an int"),
    (lambda: lk.VectorQuantize(True, 8), TypeError, r"dim is True; it must be an int"),
    (lambda: lk.VectorQuantize(4, 8, decay="a"), TypeError, r"decay is 'a'; it must be a number"),
    (lambda: lk.VectorQuantize(4, 8).half()(X.half()), ValueError, r"moving averages need float32"),
    (lambda: lk.vector_quantize(X, C, noise=X), ValueError, r"noise and generator are for gradient='noise'"),
    (lambda: lk.vector_quantize(X, C, mask=X[:, 0]), TypeError, r"mask is torch.float32; it must be bool"),
    (lambda: lk.vector_quantize(X, C, mask=X[:5, 0] > 0), ValueError, r"mask has shape \(5,\).*\(10,\)"),
    (lambda: lk.code_statistics(X, INDICES.int(), 3), TypeError, r"indices is torch.int32; it must be int64"),
    (lambda: lk.code_statistics(X, INDICES[:4], 3), ValueError, r"indices has shape \(4,\).*\(10,\)"),
    (lambda: lk.code_statistics(X, INDICES, 0), ValueError, r"num_codes is 0; it must be at least 1"),
    (lambda: lk.lookup(X, C), TypeError, r"indices is torch.float32; it must be int64"),
    (lambda: lk.lookup(INDICES + 3, C), IndexError, r"outside \[-1, 2\]"),
    (lambda: lk.lookup(INDICES - 5, C), IndexError, r"outside \[-1, 2\]"),
    (lambda: lk.lookup(INDICES, C.expand(2, 3, 4)), ValueError, r"first axis must be 2"),
    (lambda: lk.VectorQuantize(0, 8), ValueError, r"dim is 0; it must be at least 1"),
    (lambda: lk.VectorQuantize(4, 8, update="sgd"), ValueError, r"update is 'sgd'.*'ema', 'gradient'"),
    (lambda: lk.VectorQuantize(4, 8, decay=1.5), ValueError, r"decay is 1.5; it must be in \[0, 1\]"),
    (lambda: lk.VectorQuantize(4, 8, metric="l1"), ValueError, r"metric is 'l1'"),
    (lambda: lk.VectorQuantize(4, 8, precision="high"), ValueError, r"precision is 'high'"),
    (lambda: lk.VectorQuantize(4, 8, backend="cpp"), ValueError, r"backend is 'cpp'"),
    (lambda: lk.VectorQuantize(4, 8)(torch.randn(3, 5)), ValueError, r"x has rows of 5 and codebook of 4"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_message(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_environment_variable_changes_auto_only(monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"backend is 'abacus' \(LAMKERNELS_BACKEND\).*numba"):
        lk.nearest_code(X, C)
    lk.nearest_code(X, C, backend="reference")
    monkeypatch.setenv("LAMKERNELS_BACKEND", "reference")
    assert torch.equal(lk.nearest_code(X, C), lk.nearest_code(X, C, backend="numba"))


def test_triton_on_cpu_tensors_says_what_is_missing():
    status = lk.available_backends()["triton"]
    if status.available:
        pytest.skip("Triton runs here")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: "):
        lk.nearest_code(X, C, backend="triton")
