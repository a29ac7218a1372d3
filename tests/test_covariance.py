"""The accumulator against pairs that are written out one by one, in fp64; the same bits however a stream is cut."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lamkernels as lk
from lamkernels import covariance
from lamkernels.accumulate import RowBuffer
from lamkernels.covariance import Covariance

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12}  # relative, Frobenius; 1e-7 for the others
few = settings(max_examples=60, deadline=None)


def small(*arguments, rows=16, **options):
    """An accumulator with blocks of few rows, so that short streams fill several."""
    with mock.patch.object(covariance, "block_rows", lambda _: rows):
        return Covariance(*arguments, **options)


def results(cov):
    """Everything that can be read of it, fp64."""
    read = {"count": torch.tensor(cov.count), "weight": torch.tensor(cov.weight, dtype=torch.float64)}
    if cov.count:
        read |= {"mean": cov._mean("x"), "xx": cov.covariance(ddof=0)}
        if cov._schema.second_dim is not None:
            read |= {"mean_y": cov.mean_y, "xy": cov.cross_covariance(ddof=0), "yy": cov.covariance_y(ddof=0)}
    return read


def assert_same_bits(a, b):
    first, second = results(a), results(b)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def assert_close(cov, expected, tolerance=1e-7):
    found = results(cov)
    assert found.keys() == expected.keys()
    assert found["count"] == expected["count"]
    for name in found.keys() - {"count"}:
        scale = expected[name].norm()
        if name.startswith("mean"):  # an error that is small beside the spread does not matter
            scale = scale + expected["yy" if name.endswith("y") else "xx"].trace().sqrt()
        if name == "xy":  # nothing, where the two are independent
            scale = (expected["xx"].norm() * expected["yy"].norm()).sqrt()
        error = (found[name] - expected[name]).norm() / scale.clamp_min(1e-300)
        assert error <= tolerance, f"{name}: {error}"


def oracle(x, y=None, lag=None, weights=None, starts=None):
    """The definition: every pair by itself, two passes, fp64."""
    n, h = len(x), lag or 0
    second = x if lag else y
    weights = torch.ones(n) if weights is None else weights
    pairs = [
        t
        for t in range(n - h)
        if not (starts is not None and starts[t + 1 : t + h + 1].any())
        and weights[t] > 0
        and x[t].isfinite().all()
        and (second is None or second[t + h].isfinite().all())
    ]
    w = weights[pairs].double()
    sides = {"x": x[pairs].double()}
    if second is not None:
        sides["y"] = second[[t + h for t in pairs]].double()
    expected = {"count": torch.tensor(len(pairs)), "weight": w.sum()}
    if pairs:
        means = {side: (w[:, None] * rows).sum(0) / w.sum() for side, rows in sides.items()}
        expected |= {"mean" if side == "x" else "mean_y": mean for side, mean in means.items()}
        for a, b in ("xx", "xy", "yy") if second is not None else ("xx",):
            centred = w[:, None] * (sides[a] - means[a])
            expected[a + b] = centred.T @ (sides[b] - means[b]) / w.sum()
    return expected


@st.composite
def streams(draw, second=True):
    """Rows with everything that may go with them, the options of an accumulator, and two ways to cut them."""
    n, d = draw(st.integers(0, 90)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["plain", "lag", "y"] if second else ["plain", "y"]))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = (torch.randn(n, d, generator=generator) + draw(st.sampled_from([0.0, 10.0]))).to(dtype)
    x[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.1]))] = draw(
        st.sampled_from([math.nan, math.inf])
    )
    data, options = {"x": x}, {"rows": draw(st.sampled_from([1, 3, 16]))}
    if draw(st.booleans()):
        data["weights"] = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.8)
    if kind == "lag":
        options["lag"] = draw(st.integers(1, 20))
        if draw(st.booleans()):
            data["starts"] = torch.rand(n, generator=generator) < 0.1
    if kind == "y":
        options["dim_y"] = draw(st.integers(1, 4))
        data["y"] = torch.randn(n, options["dim_y"], generator=generator).to(dtype)
    cuts = [sorted(draw(st.lists(st.integers(0, n), max_size=6))) for _ in range(2)]
    return d, options, data, [[0, *cut, n] for cut in cuts]


def feed(cov, data, cuts, read=False):
    for start, stop in itertools.pairwise(cuts):
        cov.update(**{name: column[start:stop] for name, column in data.items()})
        if read:
            results(cov)
    return cov


@few
@given(streams())
def test_a_stream_is_its_pairs_and_any_cut_gives_the_same_bits(stream):
    d, options, data, (first, second) = stream
    a = feed(small(d, **options), data, first)
    assert_close(a, oracle(lag=options.get("lag"), **data), TOLERANCE.get(data["x"].dtype, 1e-7))
    assert_same_bits(a, feed(small(d, **options), data, second, read=True))
    assert_same_bits(a, feed(small(d, **options), data, range(len(data["x"]) + 1)))


@few
@given(streams(), st.integers(0, 1000))
def test_a_state_that_is_written_and_read_goes_on_with_the_same_bits(stream, where):
    d, options, data, (cuts, _) = stream
    undisturbed = feed(small(d, **options), data, cuts)
    cut = where % (len(data["x"]) + 1)
    before = feed(small(d, **options), data, [0, cut])
    state = before.state_dict()
    resumed = small(d, **options).load_state_dict(state)
    assert_same_bits(before, resumed)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    assert_same_bits(undisturbed, feed(resumed, data, [cut, len(data["x"])]))
    assert all(torch.equal(state[name], kept[name]) or state[name].isnan().any() for name in state)


@few
@given(streams(second=False))
def test_merging_partitions_agrees_with_the_whole(stream):
    d, options, data, (cuts, _) = stream
    tolerance = TOLERANCE.get(data["x"].dtype, 1e-7)
    parts = [feed(small(d, **options), data, cut) for cut in itertools.pairwise(cuts)]
    expected = oracle(**data)
    assert_close(_fold(copy.deepcopy(parts)), expected, tolerance)
    assert_close(_fold(copy.deepcopy(parts)[::-1]), expected, tolerance)
    while len(parts) > 1:  # as a tree
        parts = [_fold(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    assert_close(parts[0], expected, tolerance)


def _fold(parts):
    for other in parts[1:]:
        before = results(other)
        parts[0].merge(other)
        assert all(torch.equal(value, before[name]) for name, value in results(other).items())
    return parts[0]


@pytest.mark.parametrize("h", [1, 3])
def test_episodes_merge_and_a_sequence_goes_on_after_a_merge(h):
    x, starts = torch.randn(80, 3).double(), torch.arange(80) % 13 == 0
    whole = oracle(x, lag=h, starts=starts)
    a, b = small(3, lag=h).update(x[:39], starts=starts[:39]), small(3, lag=h).update(x[39:], starts=starts[39:])
    assert_close(a.merge(b), whole, 1e-12)
    a = small(3, lag=h).update(x[:30]).merge(small(3, lag=h)).update(x[30:])  # merged in the middle of a sequence
    assert_close(a, oracle(x, lag=h), 1e-12)


@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.float32, 0), (torch.float32, 1000), (torch.float64, 1000), (torch.bfloat16, 0)]
)
def test_blocks_of_the_real_size_and_a_large_mean(dtype, mean, backend):
    x = (torch.randn(17_000, 300) + mean).to(dtype)
    a, b = Covariance(300, backend=backend).update(x.T.contiguous().T), Covariance(300, backend=backend)
    for part in x.split(7001):  # and other strides
        b.update(part)
    assert_same_bits(a, b)
    expected = torch.cov(x.double().T)
    assert (a.covariance() - expected).norm() <= 1e-7 * expected.norm()
    assert torch.equal(a.covariance(), a.covariance().T)


def test_agrees_with_numpy():
    x, w = torch.randn(500, 6), torch.randint(0, 4, (500,))
    cov, rows = Covariance(6).update(x, weights=w), x.double().numpy()
    for found, expected in [
        (Covariance(6).update(x).covariance(), np.cov(rows.T)),
        (cov.covariance(), np.cov(rows.T, fweights=w)),
        (cov.covariance(ddof=0), np.cov(rows.T, fweights=w, ddof=0)),
    ]:
        assert np.linalg.norm(found.numpy() - expected) <= 1e-7 * np.linalg.norm(expected)
    np.testing.assert_allclose(cov.mean, np.average(rows, axis=0, weights=w), atol=1e-7)
    assert cov.count == int((w > 0).sum()) and cov.weight == int(w.sum())


def test_named_blocks():
    data = {"o": torch.randn(70, 3), "a": torch.randn(70, 2), "weights": torch.randn(70, 1)}
    joint = torch.cat(list(data.values()), 1).double()
    cov = small({"o": 3, "a": 2, "weights": 1})
    for start in (0, 1, 33):
        cov.update({name: data[name][start : {0: 1, 1: 33}.get(start)] for name in ("weights", "a", "o")})
    expected = torch.cov(joint.T)
    torch.testing.assert_close(cov.covariance(), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(cov.covariance("a", "o"), cov.covariance()[3:5, :3])
    assert torch.equal(cov.covariance("a"), cov.covariance()[3:5, 3:5])
    assert cov.mean.keys() == {"o", "a", "weights"}
    torch.testing.assert_close(torch.cat([cov.mean[name] for name in ("o", "a", "weights")]), joint.mean(0))


def test_named_blocks_of_the_later_row():
    data = {"o": torch.randn(70, 3), "a": torch.randn(70, 2)}
    cov = small({"o": 3, "a": 2}, lag=2).update(data)
    expected = oracle(torch.cat(list(data.values()), 1), lag=2)
    assert_close(cov, expected)
    assert torch.equal(cov.covariance("o_next", "a", ddof=0), cov.cross_covariance(ddof=0)[3:, :3].T)
    assert torch.equal(cov.covariance("o", "a_next", ddof=0), cov.cross_covariance(ddof=0)[:3, 3:])
    assert torch.equal(cov.covariance("a_next", ddof=0), cov.covariance_y(ddof=0)[3:, 3:])
    assert cov.mean.keys() == {"o", "a", "o_next", "a_next"}
    assert torch.equal(cov.mean["a_next"], cov.mean_y[3:])


def test_weights_of_one_change_no_bit():
    x = torch.randn(100, 3)
    a, b = small(3).update(x), small(3)
    b.update(x[:40]).update(x[40:60], weights=torch.ones(20, dtype=torch.bool)).update(x[60:])
    assert_same_bits(a, b)
    some = torch.ones(100).index_fill(0, torch.arange(40, 60), 0.5)
    b = small(3).update(x[:40]).update(x[40:60], weights=some[40:60]).update(x[60:])
    assert_same_bits(small(3).update(x, weights=some), b)
    a, b = small(3, lag=2).update(x), small(3, lag=2).update(x, starts=torch.arange(100) == 0)
    assert_same_bits(a, b)


def test_what_the_caller_does_with_its_tensors_does_not_matter():
    x = torch.randn(10, 3, requires_grad=True)
    cov, rows = Covariance(3), x.detach().clone()
    cov.update(rows)
    rows.zero_()
    read = cov.mean
    read.zero_()
    assert_same_bits(cov, Covariance(3).update(x))
    assert not cov.covariance().requires_grad


def test_inference_mode_and_back():
    x = torch.randn(50, 3)
    cov = small(3, lag=1)
    with torch.inference_mode():
        cov.update(x[:20] + 0).merge(small(3, lag=1).update(x[:9] + 0))
        before = results(cov)["count"]
    assert before == 27
    other = small(3, lag=1).update(x[:20]).merge(small(3, lag=1).update(x[:9])).update(x[20:])
    assert_same_bits(cov.update(x[20:]), other)


def test_reset_and_repr():
    cov = small(3, lag=1).update(torch.randn(40, 3)).reset()
    assert cov.count == 0 and cov.weight == 0
    cov.update(torch.ones(2, 3).double())
    assert repr(cov) == "Covariance(3, lag=1, precision='default', backend='auto', device='cpu'): 1 pairs"
    assert repr(Covariance({"o": 2})).startswith("Covariance({'o': 2}, precision")


def test_blocks_are_views_of_a_large_batch():
    x = torch.arange(50.0)[:, None]
    buffer = RowBuffer(rows=10, overlap=2)
    blocks = [block["x"] for block in buffer.push({"x": x})]
    assert [block[:, 0].tolist() for block in blocks] == [list(range(i, i + 12)) for i in (0, 10, 20, 30)]
    assert all(block.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for block in blocks)
    assert buffer.filled == 10
    views = [block["x"].data_ptr() - x.data_ptr() for block in buffer.push({"x": x})]
    assert views[1:] == [0, 40, 80, 120] and buffer.filled == 10  # the first one was completed in the buffer


@pytest.mark.parametrize("dim", [1, 3, 64, 500, 2048, 2**23])
def test_block_rows(dim):
    rows = covariance.block_rows(dim)
    assert rows >= 8192 and rows & (rows - 1) == 0
    assert rows == 8192 or rows * dim <= 2**22 < 2 * rows * dim


def test_a_state_that_does_not_fit_names_what_differs():
    state = Covariance(3, lag=1).update(torch.randn(5, 3)).state_dict()
    same = Covariance(3, lag=1)
    cases = [
        (Covariance(3, lag=2), state, "lag is 1, not 2$"),
        (Covariance({"o": 3}), state, r"dim is 3, not \[\['o', 3\]\]; lag is 1, not None"),
        (Covariance({"o": 1, "a": 2}), Covariance({"a": 2, "o": 1}).state_dict(), "dim is"),
        (same, {k: v for k, v in state.items() if k != "own.xx"}, r"own.xx is missing, not torch.float64 \(3, 3\)$"),
        (same, state | {"own.zz": torch.zeros(2)}, r"own.zz is torch.float32 \(2,\), not absent$"),
        (same, state | {"pending.x": state["pending.x"].int()}, "pending.x is torch.int32"),
        (same, {}, "'config'"),
        (same, state | {"pending.x": torch.zeros(2**21, 3)}, "pending rows"),
    ]
    for cov, wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            cov.load_state_dict(wrong)
        assert cov.count == 0


X = torch.zeros(4, 3)
INVALID = [
    (lambda: Covariance(0), ValueError, "dim is 0; it must be at least 1"),
    (lambda: Covariance(2.0), TypeError, "dim is 2.0; it must be an int"),
    (lambda: Covariance({}), ValueError, "dim is an empty mapping"),
    (lambda: Covariance({"o": 0}), ValueError, r"dim\['o'\] is 0"),
    (lambda: Covariance({"o": 1, "o_next": 1}, lag=1), ValueError, "'o' and 'o_next'"),
    (lambda: Covariance(3, 0), ValueError, "dim_y is 0"),
    (lambda: Covariance(3, lag=0), ValueError, "lag is 0"),
    (lambda: Covariance(3, 2, lag=1), ValueError, "dim_y is 2; it must be None with lag=1"),
    (lambda: Covariance({"o": 1}, 2), ValueError, "dim_y is 2; it must be None with named blocks"),
    (lambda: Covariance(3, precision="high"), ValueError, "precision is 'high'"),
    (lambda: Covariance(3, backend="cpp"), ValueError, "backend is 'cpp'"),
    (lambda: Covariance(3, backend="cuda").update(X), RuntimeError, "'cuda' cannot run here"),
    (lambda: Covariance(3).update([1.0]), TypeError, "x is a list"),
    (lambda: Covariance(3).update({"x": X}), TypeError, "x is a dict; it must be a torch.Tensor"),
    (lambda: Covariance({"o": 3}).update(X), TypeError, "x is a Tensor; it must be a mapping of tensors: o"),
    (lambda: Covariance({"o": 3}).update({"a": X}), ValueError, r"x has the blocks \['a'\]; they must be \['o'\]"),
    (lambda: Covariance({"o": 3}).update({"o": X[:, :2]}), ValueError, r"x\['o'\] has shape \(4, 2\).*\(N, 3\)"),
    (lambda: Covariance({"o": 3, "a": 3}).update({"o": X, "a": X[1:]}), ValueError, r"x\['a'\] has shape.*\(4, 3\)"),
    (lambda: Covariance(3).update(X[0]), ValueError, r"x has shape \(3,\); it must be \(N, 3\)"),
    (lambda: Covariance(3).update(X.int()), TypeError, "x is torch.int32"),
    (lambda: Covariance(3).update(X).update(X.double()), TypeError, "x is torch.float64; it must be torch.float32"),
    (lambda: Covariance(3).update(X, X), ValueError, "y is given, but dim_y is None"),
    (lambda: Covariance(3, 3).update(X), ValueError, "y is missing, but dim_y is 3"),
    (lambda: Covariance(3, 3).update(X, X[1:]), ValueError, r"y has shape \(3, 3\); it must be \(4, 3\)"),
    (lambda: Covariance(3, 3).update(X, X.half()), TypeError, "y is torch.float16; it must be torch.float32"),
    (lambda: Covariance(3).update(X).update(X.to("meta")), ValueError, "x is on meta; it must be on cpu"),
    (lambda: Covariance(3, device="meta").update(X), ValueError, "x is on cpu; it must be on meta"),
    (lambda: Covariance(3).update(X, weights=[1.0]), TypeError, "weights is a list"),
    (lambda: Covariance(3).update(X, weights=X), ValueError, r"weights has shape \(4, 3\); it must be \(4,\)"),
    (lambda: Covariance(3).update(X, weights=X[:, 0] - 1), ValueError, "weights has entries that are negative"),
    (lambda: Covariance(3).update(X, weights=X[:, 0] / 0), ValueError, "weights has entries that are .*not finite"),
    (lambda: Covariance(3).update(X, starts=X[:, 0] > 0), ValueError, "starts is given, but lag is None"),
    (lambda: Covariance(3, lag=1).update(X, starts=X[:, 0]), TypeError, "starts is torch.float32; it must be bool"),
    (lambda: Covariance(3).merge(X), TypeError, "other is a Tensor"),
    (lambda: Covariance(3).merge(Covariance(4)), ValueError, "other does not fit: dim is 4, not 3"),
    (lambda: Covariance(3).mean, ValueError, "0 rows are in"),
    (lambda: Covariance(3, lag=1).update(X[:1]).mean_y, ValueError, "0 pairs are in"),
    (lambda: Covariance(3).update(X).mean_y, ValueError, "a second one comes with dim_y or lag"),
    (lambda: Covariance(3).covariance(), ValueError, "0 rows of weight 0 are in; a covariance with ddof=1 needs"),
    (lambda: Covariance(3).update(X[:1]).covariance(), ValueError, "1 rows of weight 1 are in.*above 1"),
    (lambda: Covariance(3).update(X).covariance(ddof=-1), ValueError, "ddof is -1"),
    (lambda: Covariance(3).update(X).cross_covariance(), ValueError, "dim_y or lag"),
    (lambda: Covariance(3).update(X).covariance("o"), ValueError, "first is 'o'; the named blocks are none"),
    (lambda: Covariance({"o": 3}, lag=1).covariance("o", "a"), ValueError, "second is 'a'.* 'o', 'o_next'"),
    (lambda: Covariance({"o": 3}).covariance(second="o"), ValueError, "first is None and second is 'o'"),
]


@pytest.mark.parametrize(("call", "error", "message"), INVALID)
def test_message(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_refused_update_takes_nothing_in():
    cov = Covariance(3).update(X[:1] + 1)
    with pytest.raises(ValueError, match="weights"):
        cov.update(X, weights=X[:, 0] - 1)
    other = cov.merge
    with pytest.raises(ValueError, match="this accumulator"):
        other(cov)
    assert cov.count == 1 and cov.mean.tolist() == [1, 1, 1]


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lk, "Covariance", Covariance, raising=False)
    text = (Path(__file__).parents[1] / "docs" / "covariance.md").read_text()
    names = {}
    for block in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
        assert names["cov"].count in (10_000, 990, 1000)
