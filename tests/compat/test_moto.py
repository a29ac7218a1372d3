"""Moto's quantiser beside its plain form: checkpoints, results, gradients, training, remapping, refusals."""

import functools

import numpy as np
import pytest
import torch
from lamkernels.bench.stock import moto as stock
from lamkernels.bench.stock import villa_x as stock_villa_x
from parity import gradients, no_host_sync, swapped, training_run
from torch import nn

from lamkernels.compat.moto import VectorQuantizer2


@pytest.fixture(autouse=True)
def chosen_backend(backend, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", backend)


def pair(*args, dtype=torch.float32, **options):
    """The plain form and ours, with the same codes."""
    theirs, ours = stock.VectorQuantizer2(*args, **options), VectorQuantizer2(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def remap_file(folder, used):
    np.save(folder / "used.npy", np.array(used))
    return str(folder / "used.npy")


def assert_same(got, expected, rtol=1e-5, atol=1e-6):
    assert got[1].dtype == torch.int64 and torch.equal(got[1], expected[1])
    for ours, theirs in ((got[0], expected[0]), (got[2], expected[2])):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("used", [None, [3, 0, 5]])
def test_checkpoints_load_strictly_both_ways(used, tmp_path):
    options = {} if used is None else {"remap": remap_file(tmp_path, used), "unknown_index": "extra"}
    theirs, ours = stock.VectorQuantizer2(8, 6, 0.25, **options), VectorQuantizer2(8, 6, 0.25, **options)
    names = {"embedding.weight"} if used is None else {"embedding.weight", "used"}
    assert set(ours.state_dict()) == set(theirs.state_dict()) == names
    assert not torch.equal(ours.embedding.weight, theirs.embedding.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.embedding.weight, theirs.embedding.weight)
    theirs.load_state_dict(VectorQuantizer2(8, 6, 0.25, **options).state_dict(), strict=True)
    for name in ("n_e", "e_dim", "beta", "legacy", "remap", "re_embed", "sane_index_shape"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.legacy is True


def test_one_seed_gives_the_codes_of_upstream():
    torch.manual_seed(3)
    theirs = stock.VectorQuantizer2(16, 4, 0.25)
    torch.manual_seed(3)
    ours = VectorQuantizer2(16, 4, 0.25)
    assert torch.equal(ours.embedding.weight, theirs.embedding.weight)
    assert ours.embedding.weight.abs().max() <= 1 / 16


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sane", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 16), (7, 1, 16), (9, 16), (2, 3, 4, 16)], ids=str)
def test_results_and_gradients(shape, sane, legacy):
    theirs, ours = pair(32, 16, 0.3, legacy=legacy, sane_index_shape=sane)
    z = torch.randn(shape) / 32
    got = ours(z)
    assert_same(got, theirs(z))
    b, n = shape[0], z[0].numel() // 16
    assert got[0].shape == (b, n, 16) and got[1].shape == ((b, n) if sane else (b * n,))
    weight = torch.randn(b, n, 16)

    def total(module, leaf):
        z_q, _, loss = module(leaf)
        return (z_q * weight).sum() + 3e3 * loss

    torch.testing.assert_close(gradients(ours, z, total), gradients(theirs, z, total), rtol=1e-5, atol=1e-6)


def test_any_strides_where_upstream_needs_a_view():
    theirs, ours = pair(32, 16, 0.25)
    z = torch.randn(4, 6, 16).transpose(0, 1) / 32
    with pytest.raises(RuntimeError):
        z.view(-1, 16)
    assert_same(ours(z), theirs(z.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hundred_steps_of_training(dtype, legacy):
    theirs, ours = pair(32, 8, 0.25, legacy=legacy, dtype=dtype)
    encoder = nn.Linear(16, 32).to(dtype)
    batches = [torch.randn(24, 16, dtype=dtype) for _ in range(100)]

    def step(module, z):
        z_q, indices, loss = module(z.reshape(24, 4, 8))
        return z_q.reshape(24, 32), indices, loss

    for optimiser in (functools.partial(torch.optim.SGD, lr=0.1), functools.partial(torch.optim.Adam, lr=3e-3)):
        runs = [training_run(module, encoder, batches, step, optimiser) for module in (theirs, ours)]
        (their_indices, their_losses, their_state), (our_indices, our_losses, our_state) = runs
        assert all(torch.equal(a, b) for a, b in zip(our_indices, their_indices, strict=True))
        assert len(torch.cat(our_indices).unique()) > 1
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(our_losses, their_losses, **tolerance)
        torch.testing.assert_close(our_state, their_state, **tolerance)
        assert not torch.allclose(our_state["embedding.weight"], ours.embedding.weight)


def test_autocast_does_not_round_the_distances():
    """Upstream's products are bf16 there and choose other codes; z_q and loss have its dtype."""
    theirs, ours = pair(64, 16, 0.25)
    z = torch.randn(40, 8, 16) / 64
    with torch.autocast("cpu", torch.bfloat16):
        rounded, got, half = theirs(z), ours(z), ours(z.bfloat16())
    assert not torch.equal(rounded[1], theirs(z)[1])
    assert_same(got, theirs(z))
    assert rounded[0].dtype == rounded[2].dtype == got[0].dtype == got[2].dtype == half[0].dtype == torch.float32
    assert_same(half, theirs(z.bfloat16().float()))


@pytest.mark.parametrize("sane", [False, True])
@pytest.mark.parametrize("unknown", ["random", "extra", "closest", 2])
@pytest.mark.parametrize("setup", [False, True])
def test_remapping(unknown, sane, setup, tmp_path):
    used = [5, 1, 9, 3]
    path = remap_file(tmp_path, used)
    if setup:
        theirs, ours = pair(12, 8, 0.25, sane_index_shape=sane)
        for module in (theirs, ours):
            module.setup_remap(path, unknown)
    else:
        theirs, ours = pair(12, 8, 0.25, remap=path, unknown_index=unknown, sane_index_shape=sane)
    assert ours.re_embed == theirs.re_embed == len(used) + (unknown == "extra")
    assert torch.equal(ours.used, torch.tensor(used)) and set(ours.state_dict()) == {"embedding.weight", "used"}
    z = torch.randn(5, 7, 8) / 12
    results = []
    for module in (ours, theirs):
        torch.manual_seed(11)
        results.append(module(z))
    assert_same(*results)
    flat = (35,) if unknown == "closest" else (35, 1)
    assert results[0][1].shape == ((5, 7) if sane else flat)

    def total(module, leaf):
        z_q, _, loss = module(leaf)
        return z_q.square().sum() + loss

    torch.testing.assert_close(gradients(ours, z, total), gradients(theirs, z, total), rtol=1e-5, atol=1e-6)
    positions = torch.randint(0, 4, (3, 5))
    entry = ours.get_codebook_entry(positions)
    assert torch.equal(entry, theirs.get_codebook_entry(positions))
    assert torch.equal(entry.reshape(3, 5, 8), ours.embedding.weight[torch.tensor(used)[positions]])


def test_closest_takes_the_position_for_a_code(tmp_path):
    ours = VectorQuantizer2(4, 2, 0.25, remap=remap_file(tmp_path, [3, 2]), unknown_index="closest")
    ours.embedding.weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    z_q, indices, _ = ours(torch.tensor([[[3.0, 3.0]], [[0.0, 0.0]]]))
    assert indices.tolist() == [0, 1]  # codes 3 and 2
    assert z_q.tolist() == [[[0.0, 0.0]], [[1.0, 1.0]]]  # codes 0 and 1
    assert ours.get_codebook_entry(indices).tolist() == [[3.0, 3.0], [2.0, 2.0]]


def test_codebook_entries():
    theirs, ours = pair(12, 8, 0.25)
    indices = torch.randint(0, 12, (3, 4))
    assert torch.equal(ours.get_codebook_entry(indices), theirs.get_codebook_entry(indices))


def test_rows_that_are_not_finite():
    _, ours = pair(12, 8, 0.25)
    z = torch.randn(3, 3, 8)
    z[1, 2, 0], z[2, 0, 3] = torch.nan, torch.inf
    good = z.isfinite().all(-1)
    z_q, indices, loss = ours(z)
    assert z_q[~good].isnan().all() and z_q[good].isfinite().all() and (indices.reshape(3, 3)[~good] == 0).all()
    torch.testing.assert_close(loss, ours(z[good][None])[2])


@pytest.mark.parametrize("unknown", [None, "extra", "random", "closest"])
def test_an_existing_module_gets_the_class(unknown, tmp_path):
    options = {} if unknown is None else {"remap": remap_file(tmp_path, [4, 2, 6]), "unknown_index": unknown}
    theirs = stock.VectorQuantizer2(32, 16, 0.25, **options)
    assert VectorQuantizer2.refusal(theirs) is None
    ours = swapped(theirs, VectorQuantizer2)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        results.append(module(*ours.probe()))
    assert_same(*results)
    ours.setup_remap(remap_file(tmp_path, [1, 2]), 0)
    assert ours(*ours.probe())[1].max() <= 1


def test_what_is_refused():
    odd = stock.VectorQuantizer2(8, 4, 0.25)
    odd.n_e = 9
    for refused, reason in (
        (stock_villa_x.VectorQuantizer2(8, 4, 0.25), "it has no setup_remap"),
        (odd, "of (8, 4); it must be floats of (n_e, e_dim)"),
    ):
        assert reason in VectorQuantizer2.refusal(refused)


def test_nothing_waits_and_no_matrix_is_kept():
    _, ours = pair(64, 8, 0.25)
    z = torch.randn(64, 8, 8, requires_grad=True)
    with no_host_sync() as trace:
        z_q, _, loss = ours(z)
        (z_q.sum() + loss).backward()
    assert trace.largest <= 512 * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.randn(3, 8), temp=0.5), r"temp is 0\.5"),
        (lambda m: m(torch.randn(3, 8), rescale_logits=True), "rescale_logits is True"),
        (lambda m: m(torch.randn(3, 8), return_logits=True), "return_logits is True"),
        (lambda m: m(torch.randn(3, 7)), r"z has shape \(3, 7\).*e_dim = 8"),
        (lambda m: m.setup_remap("used.npy", "nearest"), "'random', 'extra', 'closest', or an int"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(VectorQuantizer2(12, 8, 0.25))
