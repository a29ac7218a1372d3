"""tinyworlds' quantiser beside its plain form: checkpoints, levels, ties, gradients, training, indices, refusals."""

import functools

import pytest
import torch
from lamkernels.bench.stock import tinyworlds as stock
from parity import gradients, no_host_sync, swapped, training_run
from torch import nn

from lamkernels.compat.tinyworlds import FiniteScalarQuantizer

BINS = (2, 3, 4, 5, 6, 7, 8)


@pytest.fixture(autouse=True)
def chosen_backend(backend, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", backend)


def digits(module, quantized):
    """The position of every entry's level."""
    return ((quantized + 1) / 2 * (module.num_bins - 1)).round().long()


def away_from_edges(z, bins):
    """z without the entries that rounding decides."""
    scaled = (z.double().tanh() + 1) / 2 * (bins - 1)
    return z.where((scaled - scaled.floor() - 0.5).abs() > 1e-5, 0.3)


@pytest.mark.parametrize("bins", BINS)
def test_checkpoints_load_strictly_both_ways(bins):
    theirs, ours = stock.FiniteScalarQuantizer(3, bins), FiniteScalarQuantizer(3, bins)
    assert set(ours.state_dict()) == set(theirs.state_dict()) == {"basis"}
    assert ours.basis.dtype == torch.int64 and ours.basis.tolist() == [1, bins, bins**2]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert ours.codebook_size == theirs.codebook_size == bins**3 and ours.num_bins == bins
    assert torch.equal(ours.levels_np, theirs.levels_np)
    assert FiniteScalarQuantizer().codebook_size == 4**5


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 2), (7, 1, 1, 5), (11, 3), (4,), (0, 3)], ids=str)
def test_levels_and_gradients(shape, bins):
    theirs, ours = stock.FiniteScalarQuantizer(shape[-1], bins), FiniteScalarQuantizer(shape[-1], bins)
    z = away_from_edges(torch.randn(shape) * 1.5, bins)
    got, expected = ours(z), theirs(z)
    assert got.dtype == torch.float32 and got.shape == shape
    assert torch.equal(digits(ours, got), digits(ours, expected))
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-7)
    weight = torch.randn(shape)
    both = [gradients(module, z, lambda m, leaf: (m(leaf) * weight).sum()) for module in (ours, theirs)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bins", BINS)
def test_zero_goes_where_upstream_rounds_it(bins, dtype):
    theirs, ours = stock.FiniteScalarQuantizer(2, bins), FiniteScalarQuantizer(2, bins)
    z = torch.tensor([[0.0, -0.0], [0.25, -0.25]], dtype=dtype)
    got = ours(z)
    assert got.dtype == dtype
    assert torch.equal(digits(ours, got.float()), digits(ours, theirs(z.float())))
    if bins == 2:
        assert got.tolist() == [[-1, -1], [1, -1]]


def test_levels_that_lie_close_in_half_precision():
    ours = FiniteScalarQuantizer(1, 402)
    z = (torch.arange(-300, 300) * 1e-4).half()[:, None]
    exact = FiniteScalarQuantizer(1, 402)(z.double())
    assert torch.equal(digits(ours, ours(z).double()), digits(ours, exact)) and len(exact.unique()) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bins", [2, 4])
def test_a_hundred_steps_of_training(dtype, bins):
    encoder = nn.Linear(16, 6).to(dtype)
    batches = [torch.randn(24, 16, dtype=dtype) for _ in range(100)]

    def step(module, z):
        quantized = module(z.reshape(24, 3, 2))
        indices = module.get_indices_from_latents(quantized)
        return quantized.reshape(24, 6), indices, quantized.new_zeros(())

    for optimiser in (functools.partial(torch.optim.SGD, lr=0.1), functools.partial(torch.optim.Adam, lr=3e-3)):
        runs = [
            training_run(form(2, bins), encoder, batches, step, optimiser)
            for form in (stock.FiniteScalarQuantizer, FiniteScalarQuantizer)
        ]
        (their_indices, their_losses, their_state), (our_indices, our_losses, our_state) = runs
        assert all(torch.equal(a, b) for a, b in zip(our_indices, their_indices, strict=True))
        assert len(torch.cat(our_indices).unique()) > 1
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(our_losses, their_losses, **tolerance)
        torch.testing.assert_close(our_state, their_state, **tolerance)
        assert not torch.allclose(our_state["encoder.weight"], encoder.weight)


@pytest.mark.parametrize("bins", BINS)
def test_indices_and_back(bins):
    theirs, ours = stock.FiniteScalarQuantizer(3, bins), FiniteScalarQuantizer(3, bins)
    every = torch.arange(bins**3).reshape(bins, bins, bins)
    latents = ours.get_latents_from_indices(every)
    torch.testing.assert_close(latents, theirs.get_latents_from_indices(every))
    assert latents.shape == (bins, bins, bins, 3) and latents.dtype == torch.float32
    assert torch.equal(ours.get_indices_from_latents(latents), every)
    z = away_from_edges(torch.randn(4, 2, 5, 3), bins)
    quantized = ours(z)
    assert torch.equal(ours.get_indices_from_latents(quantized), theirs.get_indices_from_latents(theirs(z)))
    outside = quantized * 3
    assert torch.equal(ours.get_indices_from_latents(outside), theirs.get_indices_from_latents(outside))
    assert ours.get_codebook_usage(latents) == 1.0 and ours.get_codebook_usage(latents[0, 0, 0, :1]) == 1 / bins


def test_more_codes_than_fp32_counts():
    ours = FiniteScalarQuantizer(30, 2)
    index = torch.tensor([[[2**24 + 1, 2**30 - 1]]])
    assert torch.equal(ours.get_indices_from_latents(ours.get_latents_from_indices(index)), index)


def test_rows_that_are_not_finite():
    ours = FiniteScalarQuantizer(2, 2)
    z = torch.tensor([[1.0, torch.nan], [torch.inf, 0.5], [2.0, -2.0]], requires_grad=True)
    quantized = ours(z)
    assert quantized[:2].isnan().all() and quantized[2].tolist() == [1.0, -1.0]
    quantized[2].sum().backward()
    assert (z.grad[:2] == 0).all() and (z.grad[2] > 0).all()


def test_autocast_compiled_and_eval():
    ours = FiniteScalarQuantizer(2, 2)
    z = torch.randn(3, 4, 5, 2)
    expected = ours(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(z), expected)
    assert torch.equal(ours.eval()(z), expected)
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(z), expected)


@pytest.mark.parametrize("bins", [2, 4])
def test_an_existing_module_gets_the_class(bins):
    theirs = stock.FiniteScalarQuantizer(3, bins)
    assert FiniteScalarQuantizer.refusal(theirs) is None
    ours = swapped(theirs, FiniteScalarQuantizer)
    (probe,) = ours.probe()
    assert probe.shape[-1] == 3
    torch.testing.assert_close(ours(probe), theirs(probe), rtol=0, atol=3e-7)
    assert torch.equal(ours.get_indices_from_latents(ours(probe)), theirs.get_indices_from_latents(theirs(probe)))


def test_what_is_refused():
    one, mixed, bare = (stock.FiniteScalarQuantizer(3, 4) for _ in range(3))
    one.num_bins = 1
    mixed.basis[2] = 7
    del bare.basis
    assert "num_bins is 1" in FiniteScalarQuantizer.refusal(one)
    assert "basis is not the powers of num_bins" in FiniteScalarQuantizer.refusal(mixed)
    assert "it has no buffer basis" in FiniteScalarQuantizer.refusal(bare)


def test_nothing_waits():
    ours = FiniteScalarQuantizer(2, 2)
    z = torch.randn(50, 21, 1, 2, requires_grad=True)
    with no_host_sync():
        ours(z).sum().backward()


def test_errors():
    with pytest.raises(ValueError, match="num_bins is 1; it must be at least 2"):
        FiniteScalarQuantizer(3, 1)
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        FiniteScalarQuantizer(2, 4)(torch.zeros(3, 2, dtype=torch.int64))
