"""taming-transformers' quantiser beside its plain form: checkpoints, results, gradients, training, refusals."""

import functools

import numpy as np
import pytest
import torch
from lamkernels.bench.stock import moto as stock_moto
from lamkernels.bench.stock import taming as stock
from parity import gradients, no_host_sync, swapped, training_run
from torch import nn

from lamkernels.compat.taming import VectorQuantizer2


@pytest.fixture(autouse=True)
def chosen_backend(backend, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", backend)


def pair(*args, dtype=torch.float32, **options):
    """The plain form and ours, with the same codes; the state is loaded strictly, one way and back."""
    theirs, ours = stock.VectorQuantizer2(*args, **options), VectorQuantizer2(*args, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def assert_same(got, expected):
    assert torch.equal(got[2][2], expected[2][2]) and got[2][:2] == expected[2][:2] == (None, None)
    torch.testing.assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-6)
    assert got[0].is_contiguous()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", [lambda z: z, lambda z: z.contiguous(memory_format=torch.channels_last)])
@pytest.mark.parametrize("shape", [(2, 16, 3, 5), (1, 16, 1, 1), (3, 16, 8, 8)], ids=str)
def test_results_and_gradients(shape, layout, legacy):
    theirs, ours = pair(32, 16, 0.3, legacy=legacy)
    z, weight = torch.randn(shape) / 32, torch.randn(shape)
    assert_same(ours(layout(z)), theirs(layout(z)))

    def total(module, leaf):
        z_q, loss, _ = module(layout(leaf))
        return (z_q * weight).sum() + 3e3 * loss

    torch.testing.assert_close(gradients(ours, z, total), gradients(theirs, z, total), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sane", [False, True])
@pytest.mark.parametrize("unknown", [None, "random", "extra", 2])
def test_remapping_and_index_shapes(unknown, sane, tmp_path):
    np.save(tmp_path / "used.npy", np.array([5, 1, 9, 3]))
    remap = {} if unknown is None else {"remap": str(tmp_path / "used.npy"), "unknown_index": unknown}
    theirs, ours = pair(12, 8, 0.25, sane_index_shape=sane, **remap)
    z = torch.randn(2, 8, 3, 5) / 12
    results = []
    for module in (ours, theirs):
        torch.manual_seed(11)
        results.append(module(z))
    assert_same(*results)
    assert results[0][2][2].shape == ((2, 3, 5) if sane else (30,) if unknown is None else (30, 1))
    positions = torch.randint(0, 4, (30,))
    entry = ours.get_codebook_entry(positions, (2, 3, 5, 8))
    assert torch.equal(entry, theirs.get_codebook_entry(positions, (2, 3, 5, 8))) and entry.shape == z.shape
    assert VectorQuantizer2.refusal(theirs) is None
    existing = swapped(theirs, VectorQuantizer2)
    for module in (existing, theirs):
        torch.manual_seed(11)
        results.append(module(*existing.probe()))
    assert_same(*results[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_hundred_steps_of_training(dtype):
    theirs, ours = pair(32, 8, 0.25, dtype=dtype)
    encoder = nn.Linear(16, 32).to(dtype)
    batches = [torch.randn(24, 16, dtype=dtype) for _ in range(100)]

    def step(module, z):
        z_q, loss, (_, _, indices) = module(z.reshape(24, 8, 2, 2))
        return z_q.reshape(24, 32), indices, loss

    optimiser = functools.partial(torch.optim.Adam, lr=3e-3)
    theirs, ours = (training_run(module, encoder, batches, step, optimiser) for module in (theirs, ours))
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours[1:], theirs[1:], **tolerance)


def test_one_seed_gives_the_codes_of_upstream():
    torch.manual_seed(3)
    theirs = stock.VectorQuantizer2(16, 4, 0.25)
    torch.manual_seed(3)
    assert torch.equal(VectorQuantizer2(16, 4, 0.25).embedding.weight, theirs.embedding.weight)


def test_what_is_refused():
    assert "it has a setup_remap" in VectorQuantizer2.refusal(stock_moto.VectorQuantizer2(8, 4, 0.25))
    sparse = stock.VectorQuantizer2(8, 4, 0.25)
    sparse.embedding = nn.Embedding(8, 4, sparse=True)
    assert "sparse" in VectorQuantizer2.refusal(sparse)


def test_nothing_waits_and_no_matrix_is_kept():
    _, ours = pair(64, 8, 0.25)
    z = torch.randn(8, 8, 8, 8, requires_grad=True)
    with no_host_sync() as trace:
        z_q, loss, _ = ours(z)
        (z_q.sum() + loss).backward()
    assert trace.largest <= 512 * 8


def test_errors():
    ours = VectorQuantizer2(12, 8, 0.25)
    for shape in ((2, 7, 3, 3), (2, 8, 3), (2, 3, 3, 8)):
        with pytest.raises(ValueError, match=r"it must be \(b, 8, h, w\)"):
            ours(torch.randn(shape))
    with pytest.raises(ValueError, match="return_logits is True"):
        ours(torch.randn(2, 8, 3, 3), return_logits=True)


def test_a_map_with_a_row_that_is_not_finite_is_the_same_in_every_layout():
    """Contiguous maps are read and written where they are, and what is special goes by the operators."""
    ours = VectorQuantizer2(16, 8, 0.3)
    base, weight = torch.randn(2, 8, 3, 4) / 16, torch.randn(2, 8, 3, 4)
    broken = base.clone()
    broken[1, 2, 0, 1] = torch.nan

    def run(z, layout=lambda t: t, unpack=lambda t: t, grad=weight):
        leaf = z.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            z_q, loss, (_, _, indices) = ours(layout(leaf))
        grads = torch.autograd.grad([z_q, loss], (leaf, ours.embedding.weight), [grad, torch.tensor(3e3)])
        return z_q, loss, indices, *grads

    for z in (base, broken):
        got = run(z)
        others = (
            run(z, lambda t: t.contiguous(memory_format=torch.channels_last)),
            run(z, unpack=lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.clone()),
            run(z, grad=weight.contiguous(memory_format=torch.channels_last)),
        )
        for other in others:
            torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(run(z, grad=torch.ones(()).expand(z.shape))[3], run(z, grad=torch.ones(z.shape))[3])
    assert got[0][1, :, 0, 1].isnan().all() and got[0].isnan().sum() == 8
    assert (got[3][1, :, 0, 1] == 0).all() and got[2][13] == 0
