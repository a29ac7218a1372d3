"""villa-X's quantiser beside its plain form: checkpoints, results, gradients, training, remapping, refusals."""

import functools

import numpy as np
import pytest
import torch
from lamkernels.bench.stock import moto as stock_moto
from lamkernels.bench.stock import villa_x as stock
from parity import gradients, no_host_sync, swapped, training_run
from torch import nn

from lamkernels.compat.villa_x import VectorQuantizer2


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
    z_q, loss, (perplexity, encodings, indices) = got
    assert perplexity is None and encodings is None
    assert indices.dtype == torch.int64 and torch.equal(indices, expected[2][2])
    torch.testing.assert_close(z_q, expected[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(loss, expected[1], rtol=rtol, atol=atol)
    assert z_q.is_contiguous()


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
    assert ours.codebook is ours.embedding.weight


def test_one_seed_gives_the_codes_of_upstream():
    torch.manual_seed(3)
    theirs = stock.VectorQuantizer2(16, 4, 0.25)
    torch.manual_seed(3)
    assert torch.equal(VectorQuantizer2(16, 4, 0.25).codebook, theirs.codebook)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 5, 16), (7, 1, 64), (9, 16), (2, 3, 4, 16), (1, 1, 1, 16), (16,), (6, 8), (3, 0, 16)], ids=str
)
def test_results_and_gradients(shape, legacy):
    theirs, ours = pair(32, 16, 0.3, legacy=legacy)
    z, weight = torch.randn(shape), torch.randn(shape)
    if 0 in shape:  # a mean of nothing is NaN there and 0 here
        z_q, loss, (_, _, indices) = ours(z)
        assert z_q.shape == shape and indices.shape == (0,) and loss == 0 and theirs(z)[1].isnan()
        return
    assert_same(ours(z), theirs(z))

    def total(module, leaf):
        z_q, loss, _ = module(leaf)
        return (z_q * weight).sum() + 3 * loss

    torch.testing.assert_close(gradients(ours, z, total), gradients(theirs, z, total), rtol=1e-5, atol=1e-6)


def test_the_losses_by_hand():
    ours = VectorQuantizer2(2, 2, 0.25)
    ours.embedding.weight.data = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
    z = torch.tensor([[1.0, 0.0], [4.0, 2.0]])
    z_q, loss, (_, _, indices) = ours(z)
    assert z_q.tolist() == [[0.0, 0.0], [4.0, 4.0]] and indices.tolist() == [0, 1]
    assert loss.item() == 1.25 * (1 + 4) / 4
    weight_grad = {}
    for legacy in (False, True):
        ours.legacy = legacy
        (weight_grad[legacy],) = torch.autograd.grad(ours(z)[1], ours.embedding.weight)
    assert weight_grad[False].tolist() == [[-0.5, 0.0], [0.0, 1.0]]
    assert torch.equal(weight_grad[True], 0.25 * weight_grad[False])


@pytest.mark.parametrize("layout", [lambda z: z.transpose(0, 1), lambda z: z[:, ::2], lambda z: z[..., :16]])
def test_any_strides(layout):
    theirs, ours = pair(32, 16, 0.25)
    base = torch.randn(6, 4, 32)[..., 8:] if layout(torch.empty(6, 4, 24)).shape[-1] == 16 else torch.randn(6, 4, 16)
    assert_same(ours(layout(base)), theirs(layout(base)))

    def total(module, leaf):
        z_q, loss, _ = module(layout(leaf))
        return z_q.transpose(0, 1).square().sum() + z_q.sum() + loss

    torch.testing.assert_close(gradients(ours, base, total), gradients(theirs, base, total), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hundred_steps_of_training(dtype, legacy):
    theirs, ours = pair(32, 8, 0.25, legacy=legacy, dtype=dtype)
    encoder = nn.Linear(16, 32).to(dtype)
    batches = [torch.randn(24, 16, dtype=dtype) for _ in range(100)]

    def step(module, z):
        z_q, loss, (_, _, indices) = module(z.reshape(24, 1, 32))
        return z_q.reshape(24, 32), indices, loss

    for optimiser in (functools.partial(torch.optim.SGD, lr=0.1), functools.partial(torch.optim.Adam, lr=3e-3)):
        runs = [training_run(module, encoder, batches, step, optimiser) for module in (theirs, ours)]
        (their_indices, their_losses, their_state), (our_indices, our_losses, our_state) = runs
        assert all(torch.equal(a, b) for a, b in zip(our_indices, their_indices, strict=True))
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(our_losses, their_losses, **tolerance)
        torch.testing.assert_close(our_state, their_state, **tolerance)
        assert not torch.allclose(our_state["embedding.weight"], ours.embedding.weight)


def test_training_and_evaluation_are_the_same():
    _, ours = pair(32, 16, 0.25)
    z = torch.randn(4, 16)
    before = ours(z)
    after = ours.eval()(z)
    assert_same(after, before, rtol=0, atol=0)
    assert torch.equal(ours.embedding.weight, VectorQuantizer2.codebook.fget(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_the_fp32_of_the_codebook(dtype):
    theirs, ours = pair(32, 16, 0.25)
    z = torch.randn(40, 16).to(dtype)
    plain = theirs(z.float(), use_entropy_loss=True)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            z_q, (loss, entropy), (_, _, indices) = ours(z, use_entropy_loss=True)
        assert z_q.dtype == loss.dtype == entropy.dtype == torch.float32
        assert torch.equal(indices, plain[2][2])
        torch.testing.assert_close((z_q, loss, entropy), (plain[0], *plain[1]), rtol=1e-5, atol=1e-5)
    leaf = z.clone().requires_grad_()
    ours(leaf)[1].backward()
    assert leaf.grad.dtype == dtype


def test_a_module_in_half_precision_returns_half_precision():
    _, ours = pair(32, 16, 0.25)
    z = torch.randn(40, 16, dtype=torch.bfloat16)
    z_q, loss, _ = ours.bfloat16()(z)
    assert z_q.dtype == loss.dtype == torch.bfloat16


@pytest.mark.parametrize("loss_type", ["softmax", "argmax"])
def test_the_entropy_loss(loss_type):
    theirs, ours = pair(16, 8, 0.25)
    affinity = -torch.rand(3, 20, 16) / 10
    kept = affinity.clone()
    got, expected = (m.entropy_loss(affinity, loss_type, temperature=0.02, ratio=0.5) for m in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(affinity, kept) and got != 0
    slopes = []
    for module in (ours, theirs):
        leaf = affinity.clone().requires_grad_()
        module.entropy_loss(leaf, loss_type, temperature=0.02).backward()
        slopes.append(leaf.grad)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"loss_type is 'max'.*'softmax', 'argmax'"):
        ours.entropy_loss(affinity, "max")


def test_forward_with_the_entropy_loss():
    theirs, ours = pair(16, 8, 0.25)
    for module in (theirs, ours):
        module.embedding.weight.data *= 0.05  # so that several codes share a row
    z = torch.randn(6, 4, 8) * 0.05
    assert_same(ours(z, use_entropy_loss=True), theirs(z, use_entropy_loss=True))

    def total(module, leaf):
        z_q, (loss, entropy), _ = module(leaf, use_entropy_loss=True)
        return z_q.sum() + loss + 2 * entropy

    torch.testing.assert_close(gradients(ours, z, total), gradients(theirs, z, total), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unknown", ["random", "extra", 2, -7])
@pytest.mark.parametrize("used", [[5, 1, 9, 3], [2, 2, 7]])
def test_remapping(unknown, used, tmp_path):
    theirs, ours = pair(12, 8, 0.25, remap=remap_file(tmp_path, used), unknown_index=unknown)
    assert ours.re_embed == theirs.re_embed == len(used) + (unknown == "extra")
    assert ours.unknown_index == theirs.unknown_index
    z = torch.randn(5, 7, 8)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(11)
        results.append(module(z))
    assert_same(*results)
    assert results[0][2][2].shape == (35, 1)
    codes = (torch.randperm(24) % 12).reshape(3, 2, 4)
    torch.manual_seed(11)
    positions = ours.remap_to_used(codes)
    torch.manual_seed(11)
    assert torch.equal(positions, theirs.remap_to_used(codes)) and positions.shape == codes.shape
    inside = positions.clamp(min=0)
    kept = inside.clone()
    assert torch.equal(ours.unmap_to_all(inside), theirs.unmap_to_all(inside)) and torch.equal(inside, kept)
    known = torch.isin(codes, torch.tensor(used))
    assert known.any() and torch.equal(ours.unmap_to_all(inside)[known], codes[known])
    flat = inside.reshape(-1)
    entry = ours.get_codebook_entry(flat, (3, 2, 4, 8))
    assert torch.equal(entry, theirs.get_codebook_entry(flat, (3, 2, 4, 8))) and entry.shape == (3, 8, 2, 4)


def test_codebook_entries():
    theirs, ours = pair(12, 8, 0.25)
    indices = torch.randint(0, 12, (24,))
    assert torch.equal(ours.get_codebook_entry(indices, None), ours.embedding.weight[indices])
    entry = ours.get_codebook_entry(indices, (2, 3, 4, 8))
    assert torch.equal(entry, theirs.get_codebook_entry(indices, (2, 3, 4, 8))) and entry.is_contiguous()


def test_sane_index_shape_where_upstream_has_it():
    theirs, ours = pair(12, 5, 0.25, sane_index_shape=True)
    z = torch.randn(2, 5, 3, 5)
    assert_same(ours(z), theirs(z))
    assert ours(z)[2][2].shape == (2, 3, 5)
    for shape in ((2, 3, 5), (2, 4, 3, 5)):
        with pytest.raises((IndexError, RuntimeError)):
            theirs(torch.randn(shape))
        with pytest.raises(ValueError, match=r"with sane_index_shape it must be \(b, h, w, c\) with h = c"):
            ours(torch.randn(shape))


def test_rows_that_are_not_finite():
    _, ours = pair(12, 8, 0.25)
    z = torch.randn(9, 8)
    z[1, 2], z[4, 0] = torch.nan, torch.inf
    good = z.isfinite().all(1)
    leaf = z.clone().requires_grad_()
    z_q, loss, (_, _, indices) = ours(leaf)
    assert z_q[~good].isnan().all() and (indices[~good] == 0).all()
    clean = ours(z[good])
    torch.testing.assert_close(loss, clean[1])
    assert torch.equal(indices[good], clean[2][2]) and torch.equal(z_q[good], clean[0])
    loss.backward()
    assert (leaf.grad[~good] == 0).all() and (leaf.grad[good] != 0).all()
    assert ours.embedding.weight.grad.isfinite().all()


@pytest.mark.parametrize("unknown", [None, "extra", "random"])
def test_an_existing_module_gets_the_class(unknown, tmp_path):
    options = {} if unknown is None else {"remap": remap_file(tmp_path, [4, 2, 6]), "unknown_index": unknown}
    theirs = stock.VectorQuantizer2(32, 16, 0.25, **options)
    assert VectorQuantizer2.refusal(theirs) is None
    ours = swapped(theirs, VectorQuantizer2)
    assert isinstance(ours, stock.VectorQuantizer2) and ours.codebook is ours.embedding.weight
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        results.append(module(*ours.probe()))
    assert_same(*results)
    assert ours.get_codebook_entry(torch.tensor([0, 1, 2, 1]), (1, 2, 2, 16)).shape == (1, 16, 2, 2)
    sane = swapped(stock.VectorQuantizer2(32, 3, 0.25, sane_index_shape=True), VectorQuantizer2)
    assert sane(*sane.probe())[2][2].shape == (2, 1, 3)


def test_what_is_refused():
    def module(**changes):
        theirs = stock.VectorQuantizer2(8, 4, 0.25)
        for name, value in changes.items():
            setattr(theirs, name, value)
        return theirs

    hooked = module()
    hooked.embedding.register_forward_hook(lambda *_: None)
    incomplete = module()
    del incomplete.legacy
    remapped = module(remap="used.npy", unknown_index="closest")
    remapped.register_buffer("used", torch.arange(3))
    for refused, reason in (
        (stock_moto.VectorQuantizer2(8, 4, 0.25), "it has a setup_remap"),
        (module(embedding=nn.Linear(4, 8)), "its embedding is of type Linear"),
        (module(embedding=nn.Embedding(8, 5)), "of (8, 5)"),
        (module(embedding=nn.Embedding(8, 4, sparse=True)), "sparse"),
        (module(embedding=nn.Embedding(8, 4, max_norm=1.0)), "max_norm"),
        (module(embedding=nn.Embedding(8, 4, padding_idx=0)), "padding_idx"),
        (module(remap="used.npy"), "expected are used"),
        (remapped, "unknown_index is 'closest'"),
        (hooked, "forward hooks"),
        (incomplete, "its legacy is missing"),
    ):
        assert reason in VectorQuantizer2.refusal(refused)


@pytest.mark.parametrize("entropy", [False, True])
def test_nothing_waits_and_no_matrix_is_kept(entropy):
    _, ours = pair(64, 8, 0.25)
    z = torch.randn(512, 8, requires_grad=True)
    with no_host_sync() as trace:
        z_q, loss, _ = ours(z, use_entropy_loss=entropy)
        (z_q.sum() + (sum(loss) if entropy else loss)).backward()
    assert (trace.largest == 512 * 64) if entropy else (trace.largest <= 512 * 8)


def test_compiled():
    _, ours = pair(32, 16, 0.25)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    z = torch.randn(4, 3, 16)
    assert_same(compiled(z), ours(z), rtol=0, atol=0)

    def total(module, leaf):
        z_q, loss, _ = module(leaf)
        return z_q.square().sum() + loss

    torch.testing.assert_close(gradients(compiled, z, total), gradients(ours, z, total))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.randn(3, 8), temp=0.5), r"temp is 0\.5; it must be None or 1\.0"),
        (lambda m: m(torch.randn(3, 8), rescale_logits=True), "rescale_logits is True; it must be False"),
        (lambda m: m(torch.randn(3, 8), return_logits=True), "return_logits is True; it must be False"),
        (lambda m: m(torch.randn(3, 7)), r"z has shape \(3, 7\).*e_dim = 8"),
        (lambda m: m.remap_to_used(torch.zeros(3, dtype=torch.int64)), r"inds has shape \(3,\)"),
        (lambda m: m.unmap_to_all(torch.zeros(3, dtype=torch.int64)), r"inds has shape \(3,\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(VectorQuantizer2(12, 8, 0.25))


def test_errors_of_remapping(tmp_path):
    path = remap_file(tmp_path, [0, 1])
    with pytest.raises(ValueError, match="unknown_index is 'closest'; it must be one of 'random', 'extra', or an int"):
        VectorQuantizer2(12, 8, 0.25, remap=path, unknown_index="closest")
    ours = VectorQuantizer2(12, 8, 0.25, remap=path)
    with pytest.raises(ValueError, match="shape is None; with remap"):
        ours.get_codebook_entry(torch.tensor([0, 1]), None)
    with pytest.raises(IndexError):
        ours.unmap_to_all(torch.tensor([[-1, 0]]))
