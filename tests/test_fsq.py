from __future__ import annotations

import math

import pytest
import torch
from contract import DTYPES

import lamkernels as lk

OPS = torch.ops.lamkernels
LEVELS = ([8, 5, 5, 5], [8, 8, 6, 5], [2, 2], [3], [7, 40, 2, 1000])
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def bounded(z, levels, symmetric):
    """What is rounded, and the half widths: the formulas of the papers, in fp64, differentiable."""
    count = torch.tensor(levels, dtype=torch.float64)
    if symmetric:
        return (count - 1) * z.tanh() / 2, (count - 1) / 2
    half = (count - 1) * (1 + 1e-3) / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0)
    return (z + (offset / half).atanh()).tanh() * half - offset, count.div(2, rounding_mode="floor")


def expected(z, levels, symmetric):
    """Quantised rows (with the straight-through gradient), indices, and how near each row is to a rounding edge."""
    inner, width = bounded(z, levels, symmetric)
    count = torch.tensor(levels, dtype=torch.float64)
    # the symmetric codes of an even number of levels lie between the integers
    shift = torch.where((count % 2 == 0) & symmetric, 0.5, 0.0)
    rounded = (inner - shift).detach().round() + shift
    basis = torch.tensor([math.prod(levels[:d]) for d in range(len(levels))])
    position = rounded + (width if not symmetric else (count - 1) / 2)
    indices = (position.round().long() * basis).sum(-1)
    near = ((inner - shift).detach().remainder(1) - 0.5).abs().amin(-1)
    return (inner + (rounded - inner).detach()) / width, indices, near


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 300, 5000])
def test_values_indices_and_gradients(backend, levels, dtype, rows, symmetric):
    x = (2 * torch.randn(rows, len(levels)) - (2 if 2 in levels else 0)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    quantized, indices = lk.finite_scalar_quantize(x, levels, symmetric=symmetric, backend=backend)
    want, want_indices, near = expected(wide, levels, symmetric)
    clear = near > 1e-12  # of an edge, where the last bit of the tanh in this test decides
    assert clear.float().mean() > 0.99
    assert quantized.dtype == dtype and indices.dtype == torch.int64
    assert torch.equal(indices[clear], want_indices[clear])
    torch.testing.assert_close(quantized[clear].double(), want[clear].to(dtype).double(), rtol=1e-15, atol=1e-15)
    grad = torch.randn(rows, len(levels)).to(dtype)
    quantized.backward(grad)
    want.backward(grad.double())
    eps = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    smallest = 1e-7 if dtype == torch.float16 else 1e-13  # half of the smallest; what 1 − tanh² loses in this test
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2 * eps, atol=smallest)
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_code_is_reached_and_is_the_code_of_its_index(backend, levels, symmetric):
    codes = math.prod(levels)
    indices = torch.arange(codes) if codes < 10000 else torch.randint(codes, (10000,))
    rows = lk.finite_scalar_codes(indices, levels, symmetric=symmetric, dtype=torch.float64)
    count = torch.tensor(levels)
    if symmetric:
        inner = rows * (1 - 1e-9)  # tanh never reaches ±1
        z = inner.atanh()
    else:  # the inverse of the bound
        half = (count - 1).double() * (1 + 1e-3) / 2
        offset = torch.where(count % 2 == 0, 0.5, 0.0).double()
        z = ((rows * (count // 2) + offset) / half).atanh() - (offset / half).atanh()
    quantized, found = lk.finite_scalar_quantize(z, levels, symmetric=symmetric, backend=backend)
    assert torch.equal(found, indices) and torch.equal(quantized, rows)
    assert rows.abs().max() == 1


def test_the_level_is_exact_next_to_every_edge(backend):
    edges = [math.atanh((j - 4.0) / (7 * 1.001 / 2)) - math.atanh(0.5 / (7 * 1.001 / 2)) for j in range(1, 8)]
    for j, edge in enumerate(edges):
        low = torch.tensor(edge, dtype=torch.float32)
        while float(low) >= edge:
            low = torch.nextafter(low, torch.tensor(-torch.inf))
        high = torch.nextafter(low, torch.tensor(torch.inf))
        _, indices = lk.finite_scalar_quantize(torch.stack([low, high])[:, None], [8], backend=backend)
        assert indices.tolist() == [j, j + 1]
    _, indices = lk.finite_scalar_quantize(
        torch.tensor([[-1e-30], [0.0], [-0.0]]), [2], symmetric=True, backend=backend
    )
    assert indices.tolist() == [0, 1, 1]


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [8, 8, 6, 5], [2, 2], [3, 3]], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_agrees_with_vector_quantize_pytorch(backend, levels, symmetric):
    peer = pytest.importorskip("vector_quantize_pytorch").FSQ([4] * len(levels), preserve_symmetry=symmetric)
    # its constructor refuses two levels without preserve_symmetry; its formula takes them
    peer._levels.copy_(torch.tensor(levels))
    peer._basis.copy_(torch.tensor([math.prod(levels[:d]) for d in range(len(levels))]))
    x = (1.5 * torch.randn(20, 500, len(levels)) - (3 if 2 in levels and not symmetric else 0)).requires_grad_()
    theirs, their_indices = peer(x)
    grad = torch.randn_like(x)
    (their_grad,) = torch.autograd.grad(theirs, x, grad)
    quantized, indices, loss = lk.FSQ(levels, symmetric=symmetric, backend=backend)(x)
    quantized.backward(grad)
    _, _, near = expected(x.detach().double(), levels, symmetric)
    clear = near > 1e-4  # their tanh and their constants are rounded to fp32
    assert clear.float().mean() > 0.99 and their_indices.dtype == torch.int32 and loss == 0
    assert torch.equal(indices[clear], their_indices[clear].long())
    torch.testing.assert_close(quantized[clear], theirs[clear], rtol=1e-6, atol=1e-6)
    # theirs is 1 − tanh², which cancels
    torch.testing.assert_close(x.grad, their_grad, rtol=1e-5, atol=1e-4 if 2 in levels and not symmetric else 2e-6)
    every = torch.arange(math.prod(levels))
    torch.testing.assert_close(
        lk.finite_scalar_codes(every, levels, symmetric=symmetric), peer._indices_to_codes(every)
    )


@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[..., ::2]])
@pytest.mark.parametrize(
    "reduce",
    [
        lambda q: q.sum(),  # an expanded gradient, stride 0
        lambda q: (q.transpose(0, 1) * torch.arange(q.shape[0])[:, None]).sum(),
        lambda q: q[:, ::2].square().sum(),
        lambda q: (q.mean(-1) ** 2).sum(),
    ],
)
def test_any_strides(backend, layout, reduce):
    base = torch.randn(10, 12, 8, dtype=torch.float64, requires_grad=True)
    levels = [3, 4, 5, 6, 7, 8, 9, 10][: layout(base).shape[-1]]
    reduce(lk.finite_scalar_quantize(layout(base), levels, backend=backend)[0]).backward()
    mine, base.grad = base.grad, None
    reduce(expected(layout(base), levels, False)[0]).backward()
    torch.testing.assert_close(mine, base.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite(backend, dtype):
    x = torch.randn(600, 3).to(dtype)
    x[::5, 1], x[1::5, 0], x[2::5, 2] = torch.nan, torch.inf, -torch.inf
    bad = ~x.isfinite().all(-1)
    x.requires_grad_()
    quantized, indices = lk.finite_scalar_quantize(x, [5, 4, 3], backend=backend)
    clean, clean_indices = lk.finite_scalar_quantize(x.detach()[~bad], [5, 4, 3], backend=backend)
    assert quantized[bad].isnan().all() and (indices[bad] == -1).all()
    assert torch.equal(quantized[~bad], clean) and torch.equal(indices[~bad], clean_indices)
    quantized.nan_to_num().sum().backward()
    assert (x.grad[bad] == 0).all() and (x.grad[~bad] > 0).all()
    assert lk.finite_scalar_codes(indices, [5, 4, 3])[bad].isnan().all()
    assert (lk.FSQ([5, 4, 3], backend=backend)(x)[1][bad] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_and_huge_entries(backend, dtype):
    x = torch.empty(0, 4, 2, dtype=dtype, requires_grad=True)
    quantized, indices = lk.finite_scalar_quantize(x, [4, 4], backend=backend)
    assert quantized.shape == (0, 4, 2) and indices.shape == (0, 4)
    quantized.sum().backward()
    assert x.grad.shape == x.shape
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest]], dtype=dtype, requires_grad=True)
    quantized, indices = lk.finite_scalar_quantize(x, [5, 4], backend=backend)
    assert quantized.tolist() == [[1.0, -1.0]] and indices.tolist() == [4]
    quantized.sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0]]


def test_opcheck(backend):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 30, 3, dtype=dtype, requires_grad=True)
        torch.library.opcheck(OPS.finite_scalar_quantize, (x, [4, 5, 6], False, backend), test_utils=UTILITIES)
        arguments = (x.detach(), torch.zeros(2, 30, dtype=torch.int64), x.detach(), [4, 5, 6], True, backend)
        torch.library.opcheck(OPS.finite_scalar_quantize_backward, arguments, test_utils=UTILITIES)


def test_compiled_autocast_and_vmap(backend):
    module = lk.FSQ([8, 5, 5], backend=backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for rows in (16, 33, 7):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 4, 3).to(dtype)
            results = []
            for function in (module, compiled, torch.vmap(module), torch.autocast("cpu", torch.bfloat16)(module)):
                leaf = x.clone().requires_grad_()
                out = function(leaf)
                out[0].float().square().sum().backward()
                results.append((out[0], out[1], leaf.grad))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: lk.finite_scalar_quantize(torch.randn(3, 2), [4]),
            ValueError,
            "rows of 2 entries and there are 1 lev",
        ),
        (lambda: lk.finite_scalar_quantize(torch.randn(3, 2), [4, 1]), ValueError, r"levels is \[4, 1\].*\[2, 65536\]"),
        (lambda: lk.finite_scalar_quantize(torch.randn(3, 2), []), ValueError, "levels is .*at least one"),
        (lambda: lk.finite_scalar_quantize(torch.randn(3, 2), [4, 2.0]), TypeError, "levels is .*integers"),
        (lambda: lk.FSQ([2**20] * 4), ValueError, r"product below 2\*\*63"),
        (lambda: lk.FSQ([4], backend="cpp"), ValueError, "backend is 'cpp'"),
        (lambda: lk.finite_scalar_quantize(torch.zeros(3, 1).int(), [4]), TypeError, "x is torch.int32"),
        (lambda: lk.finite_scalar_codes(torch.tensor([20]), [4, 5]), IndexError, r"from 20 to 20.*\[-1, 19\]"),
        (lambda: lk.finite_scalar_codes(torch.tensor([1]), [4], dtype=torch.int32), TypeError, "dtype is torch.int32"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
