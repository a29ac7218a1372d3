"""open-genie's lookup-free quantiser beside its plain form: checkpoints, results, gradients, training, refusals."""

import functools

import pytest
import torch
from lamkernels.bench.stock import open_genie as stock
from parity import gradients, no_host_sync, swapped, training_run
from torch import nn

from lamkernels.compat.open_genie import LookupFreeQuantization


@pytest.fixture(autouse=True)
def chosen_backend(backend, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", backend)


def pair(*args, dtype=torch.float32, **options):
    """The plain form and ours, with the same weights."""
    theirs, ours = stock.LookupFreeQuantization(*args, **options), LookupFreeQuantization(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def assert_same(got, expected, rtol=1e-5, atol=1e-6):
    (out, idxs), loss = got
    assert idxs.dtype == torch.int64 and idxs.shape == expected[0][1].shape and torch.equal(idxs, expected[0][1])
    torch.testing.assert_close(out, expected[0][0], rtol=rtol, atol=atol)
    assert out.shape == expected[0][0].shape
    torch.testing.assert_close(loss, expected[1], rtol=rtol, atol=atol) if expected[1] is not None else None
    assert (loss is None) == (expected[1] is None)


@pytest.mark.parametrize("options", [{}, {"n_codebook": 2}, {"input_dim": 12}, {"input_dim": 12, "use_bias": False}])
def test_checkpoints_load_strictly_both_ways(options):
    theirs, ours = stock.LookupFreeQuantization(4, **options), LookupFreeQuantization(4, **options)
    names = {"bit_mask"}
    if "input_dim" in options:
        names |= {f"proj_{side}.weight" for side in ("inp", "out")}
        names |= {f"proj_{side}.bias" for side in ("inp", "out")} if options.get("use_bias", True) else set()
    assert set(ours.state_dict()) == set(theirs.state_dict()) == names
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(LookupFreeQuantization(4, **options).state_dict(), strict=True)
    assert ours.bit_mask.tolist() == [8, 4, 2, 1] and ours.bit_mask.dtype == torch.int64
    assert torch.equal(ours.codebook, theirs.codebook) and ours.codebook.dtype == torch.float32
    for name in ("n_codebook", "frac_sample", "commit_weight", "entropy_weight", "diversity_weight"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "transpose", "options"),
    [
        ((3, 5, 4), False, {}),
        ((3, 4), False, {}),
        ((1, 5, 4), False, {}),
        ((2, 3, 5, 6, 4), False, {}),
        ((3, 4, 5), True, {}),
        ((2, 4, 3, 5, 6), True, {}),
        ((1, 4, 3, 5), True, {}),
        ((2, 8, 3, 5), True, {"n_codebook": 2}),
        ((3, 5, 8), False, {"n_codebook": 2}),
        ((3, 5, 7), False, {"input_dim": 7}),
        ((3, 7, 5, 2), True, {"input_dim": 7, "use_bias": False}),
        ((3, 5, 9), False, {"input_dim": 9, "n_codebook": 3}),
        ((2, 3, 4), False, {"diversity_weight": -0.5, "entropy_weight": 0.3, "commit_weight": 1.5}),
    ],
    ids=str,
)
def test_results_and_gradients(shape, transpose, options, training):
    theirs, ours = pair(4, **options)
    theirs.train(training), ours.train(training)
    inp = torch.randn(shape)
    expected = theirs(inp, 3.0, transpose)
    assert_same(ours(inp, 3.0, transpose), expected)
    weight = torch.randn_like(expected[0][0])

    def total(module, leaf):
        (out, _), loss = module(leaf, beta=3.0, transpose=transpose)
        return (out * weight).sum() + (0 if loss is None else 2 * loss)

    if not training and "input_dim" in options:  # what comes before the sign has a gradient of 0
        both = [gradients(module, inp, total) for module in (ours, theirs)]
        assert (both[0][0] == 0).all()
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
        return
    torch.testing.assert_close(gradients(ours, inp, total), gradients(theirs, inp, total), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("bits", [1, 6, 10])
def test_the_clamped_entropies_at_any_temperature(bits, beta):
    theirs, ours = pair(bits)
    inp = torch.randn(4, 30, bits)
    assert_same(ours(inp, beta), theirs(inp, beta))

    def total(module, leaf):
        return module(leaf, beta=beta)[1]

    torch.testing.assert_close(gradients(ours, inp, total), gradients(theirs, inp, total), rtol=1e-4, atol=2e-6)


def test_the_factorised_entropies_by_name():
    """They differ from the clamped ones by what the clamp takes away, and agree where it takes nothing."""
    for bits, codebooks in ((3, 1), (4, 2)):
        theirs = stock.LookupFreeQuantization(bits, codebooks, commit_weight=0.0)
        ours = LookupFreeQuantization(bits, codebooks, commit_weight=0.0, entropy_form="factorised")
        inp = torch.randn(4, 30, bits * codebooks) * 0.1
        assert_same(ours(inp, 2.0), theirs(inp, 2.0))

        def total(module, leaf):
            return module(leaf, beta=2.0)[1]

        torch.testing.assert_close(gradients(ours, inp, total), gradients(theirs, inp, total), rtol=1e-4, atol=1e-6)
    inp = torch.randn(8, 100, 10)
    exact, clamped = (LookupFreeQuantization(10, entropy_form=form)(inp, 1.0)[1] for form in ("factorised", "clamped"))
    assert 1e-6 < exact - clamped < 1e-2
    with torch.no_grad():
        p = (2 * inp.double().reshape(-1, 10) @ LookupFreeQuantization(10).codebook.double().T).softmax(-1)
        entropies = [-(q * q.log()).sum(-1).mean() for q in (p, p.mean(0))]
    expected = 0.1 * sum(entropies) + 0.25 * (inp - inp.sign()).square().mean()
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=0)


def test_zero_and_the_order_of_bits():
    ours = LookupFreeQuantization(4)
    inp = torch.tensor([[[0.0, 1.0, -2.0, 3.0], [0.5, -0.0, 0.0, -1.0]]])
    for training in (True, False):
        (out, idxs), _ = ours.train(training)(inp)
        assert out.tolist() == [[[0.0, 1.0, -1.0, 1.0], [1.0, 0.0, 0.0, -1.0]]]
        assert idxs.tolist() == [0b0101, 0b1000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("codebooks", [1, 2])
def test_a_hundred_steps_of_training(dtype, codebooks):
    theirs, ours = pair(4, codebooks, 10, dtype=dtype)
    encoder = nn.Linear(16, 10).to(dtype)
    batches = [torch.randn(24, 16, dtype=dtype) for _ in range(100)]

    def step(module, z):
        (out, idxs), loss = module(z.reshape(6, 4, 10), beta=2.0)
        return out.reshape(24, 10), idxs, loss

    for optimiser in (functools.partial(torch.optim.SGD, lr=0.05), functools.partial(torch.optim.Adam, lr=3e-3)):
        runs = [training_run(module, encoder, batches, step, optimiser) for module in (theirs, ours)]
        (their_indices, their_losses, their_state), (our_indices, our_losses, our_state) = runs
        assert all(torch.equal(a, b) for a, b in zip(our_indices, their_indices, strict=True))
        assert len(torch.cat(our_indices).unique()) > 1
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(our_losses, their_losses, **tolerance)
        torch.testing.assert_close(our_state, their_state, **tolerance)
        assert not torch.allclose(our_state["proj_inp.weight"], ours.proj_inp.weight)


@pytest.mark.parametrize("form", ["clamped", "factorised"])
def test_autocast_keeps_the_entropies_in_fp32(form):
    ours = LookupFreeQuantization(6, entropy_form=form)
    inp = torch.randn(4, 30, 6).bfloat16()
    (out, idxs), loss = ours(inp.float(), 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        (half_out, half_idxs), half_loss = ours(inp, 100.0)
    assert half_out.dtype == torch.bfloat16 and half_loss.dtype == torch.float32
    assert torch.equal(half_idxs, idxs) and torch.equal(half_out.float(), out)
    torch.testing.assert_close(half_loss, loss, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = stock.LookupFreeQuantization(6)(inp)
    assert theirs[0][0].dtype == half_out.dtype and theirs[1].dtype == half_loss.dtype


def test_a_module_in_half_precision_returns_half_precision():
    theirs, ours = pair(4, dtype=torch.bfloat16)
    inp = torch.randn(4, 30, 4).bfloat16()
    got, expected = ours(inp, 2.0), theirs(inp, 2.0)
    assert got[0][0].dtype == expected[0][0].dtype == got[1].dtype == expected[1].dtype == torch.bfloat16
    torch.testing.assert_close(got[1], expected[1], rtol=3e-2, atol=0)


def test_rows_that_are_not_finite():
    ours = LookupFreeQuantization(4).eval()
    inp = torch.randn(2, 3, 4, requires_grad=True)
    with torch.no_grad():
        inp[1, 2, 0] = torch.nan
    (out, idxs), _ = ours(inp)
    assert out[1, 2].isnan().all() and idxs[1, 2] == 0 and out.isnan().sum() == 4


def test_compiled():
    ours = LookupFreeQuantization(4, input_dim=6)
    inp = torch.randn(2, 6, 3, 5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(compiled(inp, 2.0, True), ours(inp, 2.0, True), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"n_codebook": 2}, {"input_dim": 12}])
def test_an_existing_module_gets_the_class(options):
    theirs = stock.LookupFreeQuantization(4, **options)
    assert LookupFreeQuantization.refusal(theirs) is None
    ours = swapped(theirs, LookupFreeQuantization)
    assert ours.entropy_form == "clamped"
    assert_same(ours(*ours.probe()), theirs(*ours.probe()))
    (probe,) = ours.probe()
    ours.entropy_form = "factorised"
    del ours.codebook
    assert_same(ours(probe, 0.3), theirs(probe, 0.3))


def test_what_is_refused():
    class Older(stock.LookupFreeQuantization):
        def forward(self, inp, beta=100.0):
            return super().forward(inp, beta)

    reversed_bits, truncated, bare = (stock.LookupFreeQuantization(4) for _ in range(3))
    reversed_bits.bit_mask = reversed_bits.bit_mask.flip(0)
    truncated.codebook = truncated.codebook[:3]
    del bare.commit_weight
    for refused, reason in (
        (Older(4), "its forward takes inp, beta; the one replaced takes inp, beta, transpose"),
        (reversed_bits, "no bit_mask of the powers of 2, the highest first"),
        (truncated, "no codebook of (2^d, d)"),
        (bare, "it has no commit_weight"),
    ):
        assert reason in LookupFreeQuantization.refusal(refused)


@pytest.mark.parametrize("form", ["clamped", "factorised"])
def test_nothing_waits_and_the_factorised_form_has_no_matrix(form):
    ours = LookupFreeQuantization(8, entropy_form=form)
    inp = torch.randn(4, 50, 8, requires_grad=True)
    with no_host_sync() as trace:
        (out, _), loss = ours(inp, 1.0)
        (out.sum() + loss).backward()
    assert (trace.largest == 200 * 256) if form == "clamped" else (trace.largest <= 200 * 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LookupFreeQuantization(4, entropy_form="exact"), "entropy_form is 'exact'.*'clamped', 'factorised'"),
        (lambda: LookupFreeQuantization(4)(torch.randn(4)), r"inp has shape \(4,\)"),
        (lambda: LookupFreeQuantization(4)(torch.randn(3, 4, 1), transpose=True), r"idxs has shape \(3,\).*two axes"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
