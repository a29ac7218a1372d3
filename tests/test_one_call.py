"""A small call in eager mode goes past the dispatcher: it must give what the registered operators give."""

from __future__ import annotations

import warnings

import pytest
import torch

import lamkernels as lk
from lamkernels import functional, lookup_free
from lamkernels.eager import is_plain

numba = pytest.importorskip("numba")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def run(x, codebook, **options):
    leaf, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    out = lk.vector_quantize(options.pop("layout", lambda t: t)(leaf), codes, backend="numba", **options)
    loss = 3 * out.commitment_loss + 5 * out.codebook_loss
    if out.quantized.requires_grad:
        out.quantized.backward(torch.ones((), dtype=x.dtype).expand(out.quantized.shape), retain_graph=True)
    loss.backward()
    return (*out, leaf.grad, codes.grad)


@pytest.fixture
def both(monkeypatch):
    """The outputs and gradients of the one call, in dirty scratch, and of the operators."""

    def compare(x, codebook, **options):
        one_call = functional.numba_one_call()
        dirty = one_call.scratch.take(1 << 16)
        dirty[0].fill(255)
        one_call.scratch.give_back(dirty)
        planned = []
        plan = functional.plan_one_call
        with monkeypatch.context() as patch:
            patch.setattr(functional, "plan_one_call", lambda *a, **k: planned.append(plan(*a, **k)) or planned[-1])
            mine = run(x, codebook, **options)
        assert planned and planned[0] is not None
        with monkeypatch.context() as patch:
            patch.setattr(functional, "plan_one_call", lambda *_, **__: None)
            return mine, run(x, codebook, **options)

    return compare


LAYOUTS = {
    "contiguous": lambda x: x,
    "every other entry": lambda x: x[..., ::2],
    "channels first": lambda x: x.transpose(1, 2).reshape(2, x.shape[2], 5, -1).movedim(1, -1),
    "expanded": lambda x: x[:, :1].expand(-1, 9, -1),
}


@pytest.mark.parametrize("gradient", ["ste", "rotation", "noise", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_the_same_bits(both, gradient, layout, dtype, metric):
    base = torch.randn(2, 50, 8).to(dtype)
    base[1, 7, 2] = torch.nan
    x = LAYOUTS[layout](base)
    codebook = torch.randn(10, x.shape[-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    noise = torch.randn(x.shape).to(dtype) if gradient == "noise" else None
    mask = torch.rand(x.shape[:-1]) < 0.8
    mine, theirs = both(
        base, codebook, layout=LAYOUTS[layout], gradient=gradient, metric=metric, noise=noise, mask=mask
    )
    for name, a, b in zip((*lk.VQOutput._fields, "grad_x", "grad_codebook"), mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("gradient", ["ste", "noise"])
def test_a_codebook_per_head(both, gradient):
    """LAPO's latents: two codebooks, rows with entries apart. The losses are means over the rows of both."""
    base, codebook = torch.randn(6, 2, 16, 4), torch.randn(2, 64, 16)
    base[0, 1, 3, 2] = torch.inf
    options = {"layout": lambda x: x.permute(1, 0, 3, 2), "gradient": gradient}
    if gradient == "noise":
        options["noise"] = torch.randn(2, 6, 4, 16)
    mine, theirs = both(base, codebook, **options)
    for name, a, b in zip((*lk.VQOutput._fields, "grad_x", "grad_codebook"), mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, equal_nan=True, msg=lambda t, name=name: f"{name}: {t}")
    assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("heads", [1, 3])
def test_gradients_of_some_outputs(heads):
    x, codebook = torch.randn(heads, 40, 8, requires_grad=True), torch.randn(heads, 10, 8, requires_grad=True)
    out = lk.vector_quantize(x, codebook, backend="numba")
    codes = codebook[torch.arange(heads)[:, None], out.indices]
    for mine, theirs in (
        (out.commitment_loss, (x - codes.detach()).square().mean()),
        (out.codebook_loss, (x.detach() - codes).square().mean()),
        (out.quantized.sin().sum(), (x + (codes - x).detach()).sin().sum()),
    ):
        grads = torch.autograd.grad(mine, (x, codebook), retain_graph=True)
        wanted = torch.autograd.grad(
            theirs, (x, codebook), retain_graph=True, materialize_grads=True, allow_unused=True
        )
        torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-7)
    frozen = lk.vector_quantize(x, codebook.detach(), backend="numba")
    (grad,) = torch.autograd.grad(frozen.commitment_loss, x)
    torch.testing.assert_close(grad, torch.autograd.grad((x - codes.detach()).square().mean(), x)[0])


def test_second_derivatives_and_batches_of_gradients(both):
    x, codebook = torch.randn(20, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    out = lk.vector_quantize(x, codebook, gradient="noise", noise=torch.randn(20, 4), backend="numba")
    grads = torch.randn(3, 20, 4)
    batched = torch.autograd.grad(out.quantized, (x, codebook), grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out.quantized, (x, codebook), g, retain_graph=True) for g in grads]
    for mine, theirs in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs))
    (first,) = torch.autograd.grad(out.commitment_loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.square().sum().backward()


def test_what_the_dispatcher_must_see_is_not_plain():
    x = torch.randn(3, 4)
    assert is_plain(x, torch.nn.Parameter(x))
    seen = []
    torch.func.vmap(lambda row: seen.append(is_plain(row)) or row)(x)
    torch.jit.trace(lambda row: seen.append(is_plain(row)) or row + 1, (x,), check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        seen.append(is_plain(x))
    complex_tensor = torch.randn(3, 4, dtype=torch.complex64)
    outlived = []
    torch.func.grad(lambda t: outlived.append(t) or t.sum())(x)
    zeros = torch._efficientzerotensor((3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are a prototype
        nested = torch.nested.nested_tensor([x, x])
    others = complex_tensor.conj().imag, x.to("meta"), x.to_sparse(), x.to_mkldnn(), nested, None, zeros, *outlived
    seen += [is_plain(other) for other in others]
    with torch.device("meta"):  # torch functions called behind the dispatcher would make tensors there
        seen.append(is_plain(x))
        assert lk.nearest_code(x, x).tolist() == [0, 1, 2]
    assert seen == [False] * 12
    negated = complex_tensor.conj().imag  # whose memory has the other sign
    codebook = torch.randn(6, 4)
    assert torch.equal(lk.nearest_code(negated, codebook), lk.nearest_code(negated.clone(), codebook))
    mine, theirs = (lk.vector_quantize(t, codebook) for t in (negated, negated.clone()))
    assert torch.equal(mine.indices, theirs.indices)


def test_large_scratch_is_not_kept():
    one_call = functional.numba_one_call()
    x, codebook = torch.randn(70000, 16), torch.randn(1500, 16)
    out = lk.vector_quantize(x, codebook, backend="numba")
    assert functional.plan_one_call(x, codebook, "ste", "l2", "default", "numba").plan.scratch > one_call.KEPT
    assert all(memory.size <= one_call.KEPT for memory, _ in one_call.scratch.kept)
    assert torch.equal(out.counts, torch.bincount(out.indices, minlength=1500))


def copies_with_other_strides(tensor):
    """What a hook on saved tensors may give back: the same values elsewhere."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor.clone()


@pytest.mark.parametrize("gradient", ["ste", "rotation", "noise"])
@pytest.mark.parametrize("strided", [False, True])
def test_saved_tensors_may_come_back_elsewhere(gradient, strided):
    base, codebook, noise = torch.randn(40, 16), torch.randn(10, 8), torch.randn(40, 8)
    grads = []
    for unpack in (lambda t: t, copies_with_other_strides):
        x, codes = base.clone().requires_grad_(), codebook.clone().requires_grad_()
        rows = x[:, :8] if strided else x[:, :8].contiguous()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            out = lk.vector_quantize(rows, codes, gradient=gradient, noise=noise if gradient == "noise" else None)
        (out.quantized.square().sum() + out.commitment_loss + 2 * out.codebook_loss).backward()
        grads.append((x.grad, codes.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def negated(tensor):
    """The same values, lazily negated in memory."""
    lazy = torch._neg_view(-tensor)
    assert lazy.is_neg()
    return lazy


def test_gradients_and_noise_that_are_lazily_negated():
    x, codebook, noise = torch.randn(40, 8, requires_grad=True), torch.randn(10, 8), torch.randn(40, 8)
    mine, theirs = (lk.vector_quantize(x, codebook, gradient="noise", noise=n) for n in (negated(noise), noise))
    assert torch.equal(mine.quantized, theirs.quantized)
    grad = torch.randn(40, 8)
    (wanted,) = torch.autograd.grad(theirs.quantized, x, grad, retain_graph=True)
    (got,) = torch.autograd.grad(theirs.quantized, x, negated(grad))
    torch.testing.assert_close(got, wanted)


def test_a_mask_that_wraps_another_tensor():
    from torch.testing._internal.two_tensor import TwoTensor

    x, codebook, mask = torch.randn(40, 8), torch.randn(10, 8), torch.rand(40) < 0.5
    out = lk.vector_quantize(x, codebook, mask=TwoTensor(mask, mask.clone()))
    assert int((out.indices == -1).sum()) == int((~mask).sum())


def test_weights_of_the_loss_that_are_tensors_get_their_gradient():
    x, codebook = torch.randn(40, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    plain = functional.quantize_with_loss(x, codebook, 0.25, 2.0)
    wanted = torch.autograd.grad(plain[2], (x, codebook))
    weight = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    loss = functional.quantize_with_loss(x, codebook, weight, 2.0)[2]
    *got, of_weight = torch.autograd.grad(loss, (x, codebook, weight))
    torch.testing.assert_close(got, list(wanted))
    assert of_weight > 0
    for mine, theirs in zip(plain[:2], lk.vector_quantize(x, codebook)[:2], strict=True):
        assert torch.equal(mine, theirs)


def test_a_call_within_a_call_has_scratch_of_its_own():
    one_call = functional.numba_one_call()
    outer = one_call.scratch.take(100)
    inner = one_call.scratch.take(100)
    assert outer[1] != inner[1]
    one_call.scratch.give_back(inner)
    one_call.scratch.give_back(outer)
    assert one_call.scratch.take(100) is outer


def test_the_first_backward_under_a_transform_leaves_nothing_behind():
    x, codebook = torch.randn(40, 8, requires_grad=True), torch.randn(10, 8)
    out = lk.vector_quantize(x, codebook)

    def scaled(t):
        return (t * torch.autograd.grad(out.quantized, x, torch.ones(40, 8), retain_graph=True)[0]).sum()

    assert torch.equal(torch.func.grad(scaled)(torch.randn(40, 8)), torch.ones(40, 8))
    out.quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones(40, 8))


@pytest.mark.parametrize(
    ("x", "codebook", "message"),
    [((3, 4), (), "codebook is a scalar"), ((8,), (2, 5, 4), "x has"), ((3, 5), (6, 4), "x has rows of 5")],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(x, codebook, message):
    with pytest.raises(ValueError, match=message):
        lk.vector_quantize(torch.randn(x), torch.randn(codebook), backend="numba")


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize(("option", "value"), [("precision", "exat"), ("gradient", "Rotation"), ("metric", "L2")])
def test_options_changed_after_the_constructor_are_checked(update, option, value):
    vq = lk.VectorQuantize(8, 10, update=update)
    setattr(vq, option, value)
    with pytest.raises(ValueError, match=f"{option} is '{value}'"):
        vq(torch.randn(40, 8))


def scalars(x):
    return lk.finite_scalar_quantize(x, [2 + d % 4 for d in range(x.shape[-1])], backend="numba")


def signs(x):
    mask = torch.arange(x.shape[:-1].numel()).reshape(x.shape[:-1]) % 5 > 0
    return lk.lookup_free_quantize(
        x, inv_temperature=0.7, zero="zero", mask=mask, codebook_entropy=False, backend="numba"
    )


def entropies(x):
    """Of two codebooks; of finite rows, which the others are for."""
    rows = x.nan_to_num(0.0).reshape(-1, 2, x.shape[-1] // 2).float()
    codes = lookup_free.lookup_free_codes(torch.arange(2 ** rows.shape[-1]), rows.shape[-1])
    return lookup_free.clamped_entropies(rows, codes, 0.7, 1e-2)


def differentiate(quantise, x, **options):
    leaf = x.clone().requires_grad_()
    out = [t for t in quantise(leaf) if t is not None]
    heads = [t for t in out if t.requires_grad]
    weights = [torch.full((), 2.0 + i, dtype=t.dtype).expand(t.shape) for i, t in enumerate(heads)]
    return heads, leaf, [*out, *torch.autograd.grad(heads, leaf, weights, retain_graph=True, **options)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantise", [scalars, signs, entropies])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_quantisers_without_a_codebook_give_what_their_operators_give(quantise, layout, dtype, monkeypatch):
    base = torch.randn(2, 50, 8).to(dtype)
    base[1, 7, 2] = torch.nan
    run = lambda x: quantise(LAYOUTS[layout](x))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(lookup_free, "is_plain", lambda *_: False)
        _, _, wanted = differentiate(run, base)
    heads, leaf, got = differentiate(run, base)
    exact = {"rtol": 0, "atol": 0} if quantise is not entropies else {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(got, wanted, equal_nan=True, **exact)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, copies_with_other_strides):
        torch.testing.assert_close(differentiate(run, base)[2], got, equal_nan=True, rtol=0, atol=0)
    grads = [torch.randn(3, *t.shape).to(t.dtype) for t in heads]
    batched = torch.autograd.grad(heads, leaf, grads, is_grads_batched=True, retain_graph=True)[0]
    for found, grad in zip(batched, zip(*grads, strict=True), strict=True):
        wanted = torch.autograd.grad(heads, leaf, [*grad], retain_graph=True)[0]
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6 if dtype != torch.bfloat16 else 1e-2)
    if quantise is not entropies:
        with pytest.raises(NotImplementedError, match="second derivative"):
            differentiate(run, base, create_graph=True)[2][-1].sum().backward()


def test_clamped_entropies_have_second_derivatives():
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    codes = lookup_free.lookup_free_codes(torch.arange(8), 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda t: lookup_free.clamped_entropies(t, codes, 0.7, 1e-2), x)
    assert torch.autograd.gradcheck(lambda t: lookup_free.clamped_entropies(t, codes, 0.7, 1e-2), x)
