"""Moments against fp64: shapes, strides, dtypes, weights, lags, hard data, gradients, bits, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamkernels.joint_moments import Moments, moments, off_diagonal_covariance_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-14}  # relative Frobenius error; 1e-7 for the others


def by_definition(x, y=None, lag=None, weights=None) -> Moments:
    """Moments of the pairs that are in, in fp64, from means and differences."""
    second = x[:, :0] if y is None else y
    if lag is not None:
        x, second = x[: max(len(x) - lag, 0)], x[lag:]
    w = torch.ones(len(x)).double() if weights is None else weights.double()
    inside = (w > 0) & x.isfinite().all(1) & second.isfinite().all(1)
    w, x, second = w[inside], x[inside].double(), second[inside].double()
    total = w.sum()
    if total == 0:
        total = total + 1
    mean_x, mean_y = (w @ x) / total, (w @ second) / total
    a, b = x - mean_x, second - mean_y
    xx, xy, yy = ((w[:, None] * p).T @ q for p, q in ((a, a), (a, b), (b, b)))
    if y is None and lag is None:
        return Moments(w.sum(), mean_x, None, xx, None, None)
    return Moments(w.sum(), mean_x, mean_y, xx, xy, yy)


def assert_close(got: Moments, want: Moments, tolerance: float, scale: Tensor | None = None) -> None:
    """Scatters to the tolerance of the contract; that of xy is relative to its two factors, which may be unrelated."""
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-15, atol=0)
    xx = want.xx.norm()
    yy = xx if want.yy is None else want.yy.norm()
    for name, size in (("xx", xx), ("yy", yy), ("xy", (xx * yy).sqrt())):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == torch.float64 and a.shape == b.shape and a.isfinite().all()
            assert (a - b).norm() <= tolerance * size + 1e-30, f"{name}: {(a - b).norm() / size}"
            if name != "xy":
                assert torch.equal(a, a.T)
    for mean, other, scatter in ((got.mean_x, want.mean_x, xx), (got.mean_y, want.mean_y, yy)):
        if other is not None:
            spread = (scatter / want.weight.clamp(min=1e-300)).sqrt()
            assert (mean - other).norm() <= tolerance * spread + 1e-14 * other.norm()


@st.composite
def problems(draw):
    rows = draw(st.integers(0, 100) | st.integers(256, 900))
    dim, other = (draw(st.integers(1, 40) | st.just(140)) for _ in range(2))
    kind = draw(st.sampled_from(["plain", "pairs", "lag"]))
    weighting = draw(st.sampled_from(["none", "mask", "weights"]))
    seed, offset = draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 10.0, -1000.0]))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"]))
    return rows, dim, other, kind, weighting, seed, offset, layout, draw(st.sampled_from(DTYPES)), draw(st.booleans())


def arranged(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        return x.repeat_interleave(2, 1)[:, ::2]
    return x[:1].expand(x.shape) if layout == "expanded" else x


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems())
def test_any_shape_layout_dtype_weight_and_lag(backend, problem):
    rows, dim, other, kind, weighting, seed, offset, layout, dtype, broken = problem
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, d, generator=generator) + offset for d in (dim, other))
    if broken and rows > 8:
        x[3, 0], x[rows - 1, dim - 1], y[5, other - 1] = torch.nan, torch.inf, -torch.inf
    x, y = (arranged(t.to(dtype), layout) for t in (x, y))
    lag = 1 + seed % 7 if kind == "lag" else None
    pairs = max(rows - (lag or 0), 0)
    weights = None
    if weighting != "none":
        weights = torch.rand(pairs, generator=generator)
        weights = weights < 0.7 if weighting == "mask" else weights.where(weights > 0.2, 0.0).to(dtype)
    arguments = (x, y if kind == "pairs" else None)
    for precision in ("default", "exact"):
        got = moments(*arguments, lag=lag, weights=weights, precision=precision, backend=backend)
        tolerance = TOLERANCE.get(dtype, 1e-7 if precision == "default" else 1e-14)
        # an expanded row has no spread: what is left is the rounding of the mean
        if layout == "expanded":
            got, want = got._replace(), by_definition(*arguments, lag, weights)
            assert all(t.isfinite().all() for t in got if t is not None)
            assert got.xx.norm() <= 1e-13 * (1 + offset**2) * max(float(got.weight), 1) * dim
            continue
        want = by_definition(*arguments, lag, weights)
        # the fp64 rows of an offset keep fewer digits of their spread, in the expectation too
        assert_close(got, want, tolerance * (1 + abs(offset) if tolerance < 1e-10 else 1))


@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("shape", [(20, 8), (30_000, 16), (3000, 300)], ids=str)
def test_an_offset_costs_no_accuracy(backend, shape, mean):
    x = torch.randn(shape) @ torch.linalg.qr(torch.randn(shape[1], shape[1]))[0] + mean
    assert_close(moments(x, backend=backend), by_definition(x), 1e-7)
    assert_close(moments(x, lag=3, backend=backend), by_definition(x, lag=3), 1e-7)


def few_values() -> dict[str, Tensor]:
    coin = torch.rand(20_000, 24)
    return {
        "two values": torch.where(coin < 0.3, 2.0115, 0.777),
        "two values, mean 10": torch.where(coin < 0.5, 10.1, 10.0),
        "two values, mean 1000": torch.where(coin < 0.1, 1003.4, 1000.1),
        "three values": (coin * 3).floor() * 0.3333 + 5,
        "pixels": (coin * 256).floor() / 255,
        "halves, mean 3": (torch.randn(20_000, 24) + 3).half(),
        "normal, mean 1000": torch.randn(20_000, 24) + 1000,
    }


@pytest.mark.parametrize("name", list(few_values()))
def test_equal_rows_are_not_rounded_alike(backend, name):
    x = few_values()[name]
    mask = torch.arange(len(x) - 1) % 100 != 99  # the pairs of episodes
    assert_close(moments(x, backend=backend), by_definition(x), 1e-7)
    assert_close(moments(x, lag=1, backend=backend), by_definition(x, lag=1), 1e-7)
    assert_close(moments(x, lag=1, weights=mask, backend=backend), by_definition(x, lag=1, weights=mask), 1e-7)
    assert_close(moments(x[:900], lag=40, backend=backend), by_definition(x[:900], lag=40), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_integers_are_exact(backend, dtype):
    x = torch.randint(-4, 5, (5000, 7)).to(dtype)
    for lag in (None, 1, 40):
        got, want = moments(x, lag=lag, backend=backend), by_definition(x, lag=lag)
        assert_close(got, want, 1e-13)


@pytest.mark.parametrize("lag", [1, 7, 32])
def test_runs_of_pairs(backend, lag):
    """Episodes of many lengths, some shorter than the lag, in halves that have a NaN between them."""
    x = torch.randn(4000, 150) + 20
    x[1500] = torch.nan
    mask = torch.rand(4000 - lag) < 0.995
    mask[: lag + 3] = False
    mask[lag + 3 : lag + 5] = True
    for weights in (mask, mask * 3.0):
        assert_close(
            moments(x, lag=lag, weights=weights, backend=backend), by_definition(x, lag=lag, weights=weights), 1e-7
        )


def hard_data() -> dict[str, Tensor]:
    x = torch.randn(3000, 6)
    trend = x + torch.linspace(-500, 500, 3000)[:, None]
    outlier = x.clone()
    outlier[7] = 1e6
    return {
        "a trend": trend,
        "an outlier in the first rows": outlier,
        "columns of every size": x * torch.logspace(-6, 6, 6),
        "entries near 1e30": x * 1e30,
        "entries near 1e-30": x * 1e-30,
        "a constant column": torch.cat([x, torch.full((3000, 1), 7.3)], 1),
        "two rows": x[:2] * 100 + 3,
    }


@pytest.mark.parametrize("name", list(hard_data()))
def test_hard_data(backend, name):
    x = hard_data()[name]
    mask = torch.arange(len(x)) != 7
    # beside one huge product, the small ones of its chunk are rounded alike: n·2⁻²⁴ for n rows bounds any data
    assert_close(moments(x, backend=backend), by_definition(x), 2.0**-18 if "outlier" in name else 1e-7)
    assert_close(moments(x, precision="exact", backend=backend), by_definition(x), 1e-12)
    assert_close(moments(x, weights=mask, backend=backend), by_definition(x, weights=mask), 1e-7)
    if len(x) > 20:  # the outlier is the first row of a pair and the second of none
        assert_close(moments(x, lag=8, backend=backend), by_definition(x, lag=8), 1e-7)


def test_rows_that_are_out_are_in_nothing(backend):
    x, y = torch.randn(400, 5), torch.randn(400, 3)
    keep = torch.rand(400) < 0.6
    clean = moments(x[keep], y[keep], backend=backend)
    x[~keep] = torch.tensor([torch.nan, torch.inf, 1e38, -torch.inf, 0.0])
    y[~keep] = torch.nan
    for weights in (keep, keep.double(), None):
        assert_close(moments(x, y, weights=weights, backend=backend), clean, 1e-7)
    x[~keep] = 1e38
    y[~keep] = 0
    assert_close(moments(x, y, weights=keep, backend=backend), clean, 1e-7)


def test_nothing_in_gives_zeros(backend):
    x = torch.randn(5, 3)
    for got in (
        moments(x[:0], backend=backend),
        moments(x, x[:, :2], weights=torch.zeros(5), backend=backend),
        moments(x, lag=5, backend=backend),
        moments(x, lag=9, weights=torch.ones(0), backend=backend),
        moments(x * torch.nan, lag=1, backend=backend),
    ):
        assert all((t == 0).all() for t in got if t is not None)


def test_one_row_and_equal_weights(backend):
    one = moments(torch.tensor([[3.0, -7.0]]), backend=backend)
    assert one.weight == 1 and one.mean_x.tolist() == [3.0, -7.0] and (one.xx == 0).all()
    x = torch.randn(900, 4)
    three = moments(x, weights=torch.full((900,), 3.0), backend=backend)
    assert_close(three, by_definition(x, weights=torch.full((900,), 3.0)), 1e-7)


@pytest.mark.parametrize("shape", [(60_000, 24), (3000, 150)], ids=str)
def test_the_bits_do_not_depend_on_the_threads(backend, shape):
    x, threads = torch.randn(shape), torch.get_num_threads()
    results = []
    try:
        for count in (threads, 1, 2, threads):
            torch.set_num_threads(count)
            results.append((*moments(x, lag=2, backend=backend), *moments(x, weights=x[:, 0].abs(), backend=backend)))
    finally:
        torch.set_num_threads(threads)
    if backend != "reference":  # whose products are the vendor's
        for other in results[1:]:
            assert all(a is b or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def leaves(kind: str, dtype: torch.dtype) -> tuple[list[Tensor], dict]:
    x = (torch.randn(40, 5).double() + 2).to(dtype)
    x[4, 0] = torch.nan
    y, weights = torch.randn(40, 3).to(dtype), torch.rand(40).to(dtype)
    weights[7] = 0
    if kind == "lag":
        return [x, weights[:-2].clone()], {"lag": 2}
    return [x, weights] if kind == "plain" else [x, y, weights], {}


def functional(kind: str, tensors: list[Tensor], options: dict, backend: str, function=moments) -> Tensor:
    x, *y, weights = tensors
    got = function(x, *y, weights=weights, **options, **({} if function is by_definition else {"backend": backend}))
    generator = torch.Generator().manual_seed(3)
    return sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in got if t is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "pairs", "lag"])
def test_gradients_are_those_of_the_definition(backend, kind, dtype):
    tensors, options = leaves(kind, dtype)
    ours = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.clone().double().requires_grad_() for t in tensors]
    functional(kind, ours, options, backend).backward()
    functional(kind, theirs, options, backend, by_definition).backward()
    tolerance = 1e-11 if dtype == torch.float64 else 3e-6
    for a, b in zip(ours, theirs, strict=True):
        want = b.grad
        if a is ours[-1]:  # the definition leaves out what has no weight; so does the operator
            want = want * (tensors[-1] > 0)
        assert a.grad.dtype == dtype
        assert (a.grad.double() - want).norm() <= tolerance * want.norm()


def test_second_derivatives(backend):
    x, y = torch.randn(9, 3).double().requires_grad_(), torch.randn(9, 2).double().requires_grad_()
    weights = (torch.rand(9).double() + 0.1).requires_grad_()
    torch.autograd.gradgradcheck(lambda *t: moments(*t[:2], weights=t[2], backend=backend)[1:], (x, y, weights))
    torch.autograd.gradgradcheck(lambda t: moments(t, lag=2, backend=backend)[3:], (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_covariance_loss_is_that_of_vicreg(backend, dtype):
    x = (torch.randn(200, 12) @ torch.randn(12, 12) + 5).to(dtype)
    leaf, plain = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = off_diagonal_covariance_loss(leaf, backend=backend)
    covariance = torch.cov(plain.T)
    want = (covariance.square().sum() - covariance.diagonal().square().sum()) / 12
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=3e-7, atol=0)
    grad, expected = torch.autograd.grad(loss, leaf)[0].double(), torch.autograd.grad(want, plain)[0]
    half = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    assert (grad - expected).norm() <= (half + 3e-6) * expected.norm()


def test_the_covariance_loss_leaves_rows_out_and_is_differentiable_again(backend):
    x = torch.randn(30, 4) + 1000
    x[3, 1], x[17, 0] = torch.nan, torch.inf
    inside = x.isfinite().all(1)
    leaf, rest = x.clone().requires_grad_(), x[inside].double().requires_grad_()
    off_diagonal_covariance_loss(leaf, backend=backend).backward()
    off_diagonal_covariance_loss(rest, backend="reference").backward()
    assert (leaf.grad[~inside] == 0).all()
    torch.testing.assert_close(leaf.grad[inside].double(), rest.grad, rtol=1e-4, atol=1e-5 * float(rest.grad.norm()))
    rows = torch.randn(7, 3).double().requires_grad_()
    torch.autograd.gradgradcheck(lambda t: off_diagonal_covariance_loss(t, backend=backend), (rows,))


def test_opcheck(backend):
    operator = torch.ops.lamkernels.covariance
    x = torch.randn(2, 30, 4).bfloat16().requires_grad_()
    y, weights = torch.randn(2, 30, 3).bfloat16(), torch.rand(2, 30).double().requires_grad_()
    for arguments in ((x, y, weights, 0, "exact"), (x.detach().float().requires_grad_(), None, None, 2, "default")):
        torch.library.opcheck(operator, (*arguments, backend))


def test_compiled_equals_eager(backend):
    def function(x, weights):
        lagged = moments(x, lag=2, weights=weights[2:], backend=backend)
        return lagged.xy.sum() + lagged.yy.sum() + off_diagonal_covariance_loss(x, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for rows in (16, 33):
        x, weights = torch.randn(rows, 6, requires_grad=True), torch.rand(rows)
        results = [(value := f(x, weights), *torch.autograd.grad(value, x)) for f in (function, compiled)]
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(eager, graph, rtol=1e-5, atol=1e-6)


def test_vmap(backend):
    x, weights = torch.randn(3, 40, 5), torch.rand(3, 40)
    batched = torch.vmap(lambda x, w: moments(x, weights=w, backend=backend).xx)(x, weights)
    for i in range(3):
        torch.testing.assert_close(batched[i], moments(x[i], weights=weights[i], backend=backend).xx)


X = torch.randn(6, 3)
ERRORS = [
    (lambda: moments([1.0]), TypeError, r"x is a list; it must be a torch.Tensor"),
    (lambda: moments(X.int()), TypeError, r"x is torch.int32"),
    (lambda: moments(X[0]), ValueError, r"x has shape \(3,\); it must be \(N, D\)"),
    (lambda: moments(X[:, :0]), ValueError, r"x has shape \(6, 0\).*D at least 1"),
    (lambda: moments(X, X.double()), TypeError, r"y is torch.float64 and x is torch.float32"),
    (lambda: moments(X, X[:4]), ValueError, r"y has 4 rows and x has 6"),
    (lambda: moments(X, X.to("meta")), ValueError, r"y is on meta and x on cpu"),
    (lambda: moments(X, X, lag=1), ValueError, r"y and lag=1 are both given"),
    (lambda: moments(X, lag=0), ValueError, r"lag is 0; it must be at least 1"),
    (lambda: moments(X, lag=1.5), TypeError, r"lag is 1.5; it must be an int"),
    (lambda: moments(X, weights=[1]), TypeError, r"weights is a list"),
    (lambda: moments(X, weights=torch.ones(6).long()), TypeError, r"weights is torch.int64; it must be bool"),
    (lambda: moments(X, weights=torch.ones(4)), ValueError, r"weights has shape \(4,\); it must be \(6,\)"),
    (lambda: moments(X, lag=2, weights=torch.ones(6)), ValueError, r"weights has shape \(6,\); it must be \(4,\)"),
    (lambda: moments(X, weights=-torch.ones(6)), ValueError, r"weights range from -1.0 to -1.0; .*at least 0"),
    (lambda: moments(X, weights=torch.ones(6) * torch.nan), ValueError, r"weights range from nan"),
    (lambda: moments(X, precision="fast"), ValueError, r"precision is 'fast'; it must be one of 'default', 'exact'"),
    (lambda: moments(X, backend="cpp"), ValueError, r"backend is 'cpp'"),
    (lambda: off_diagonal_covariance_loss(X[:1]), ValueError, r"x has 1 rows; a covariance needs at least 2"),
    (lambda: off_diagonal_covariance_loss(X[None]), ValueError, r"x has shape \(1, 6, 3\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
