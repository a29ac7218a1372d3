from __future__ import annotations

import itertools

import pytest
import torch
from contract import DTYPES
from torch.nn import functional as F

import lamkernels as lk
from lamkernels.ops.codebook_entropy import blocked

OPS = torch.ops.lamkernels
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def all_codes(dim, scale=1.0, dtype=torch.float64):
    """(2^D, D), counted up with the first entry as the highest bit."""
    return torch.tensor(list(itertools.product((-scale, scale), repeat=dim)), dtype=dtype)


def entropy(p, smallest=1e-300):
    return -(p * p.clamp(min=smallest).log()).sum(-1)


def expected(x, mask, scale, inv_temperature, zero="negative", smallest=1e-300):
    """Outputs by the distribution over all codes, differentiable; ``smallest`` clamps inside the logarithm."""
    codes = all_codes(x.shape[-1], scale, x.dtype)
    rows = x[mask]
    p = (2 * inv_temperature * rows @ codes.T).softmax(-1)
    q = scale * torch.where(x > 0, 1.0, torch.where((x == 0) & (zero == "zero"), 0.0, -1.0)).to(x.dtype)
    nearest = (2 * rows.detach() @ codes.T).argmax(-1)
    commitment = F.mse_loss(rows, q[mask].detach())
    return q, nearest, commitment, entropy(p, smallest).mean(), entropy(p.mean(0), smallest)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (300, 5), (5000, 3), (150, 9)], ids=str)
@pytest.mark.parametrize(("scale", "inv_temperature"), [(1.0, 0.7), (0.3, 20.0), (2.0, 100.0)])
def test_outputs_and_gradients(backend, shape, dtype, masked, scale, inv_temperature):
    x = (scale * torch.randn(shape)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    mask = torch.rand(shape[0]) < 0.7 if masked and shape[0] > 1 else None
    inside = torch.ones(shape[0], dtype=torch.bool) if mask is None else mask
    out = lk.lookup_free_quantize(x, scale=scale, inv_temperature=inv_temperature, mask=mask, backend=backend)
    q, nearest, *losses = expected(wide, inside, scale, inv_temperature)
    assert (out.indices[~inside] == -1).all() and (out.quantized[~inside] == 0).all()
    assert torch.equal(out.indices[inside], nearest) and out.indices.dtype == torch.int64
    assert torch.equal(out.quantized[inside], q[inside].to(dtype)) and out.quantized.dtype == dtype
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    rtol, atol = (1e-12, 1e-13) if dtype == torch.float64 else (2e-6, 1e-6)
    for mine, theirs in zip(out[2:], losses, strict=True):
        assert mine.dtype == accumulated and mine.shape == ()
        torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=atol)

    grad = torch.randn(shape).to(dtype)
    weights = (3.0, 2.0, -1.5)
    total = sum(w * loss for w, loss in zip(weights, out[2:], strict=True))
    torch.autograd.backward([out.quantized, total], [grad, None])
    wide_total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    straight_through = wide + (q - wide).detach()
    torch.autograd.backward([straight_through, wide_total], [grad.double() * inside[:, None], None])
    half = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)  # the gradient is stored in dtype
    # and there the three gradients are rounded before they are added up
    largest = float((wide.grad - grad.double() * inside[:, None]).abs().max())
    tolerance = (2e-6 if accumulated == torch.float32 else 1e-11) * (1 + largest) + 2 * half * largest
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=rtol + 2 * half, atol=tolerance)
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_rows_keep_small_gradients(backend, dtype):
    # probabilities of 1 − 1e-9 round to 1 in fp32: their gradients must not become rounding noise
    x = torch.tensor([[0.9, -1.1, 1.3], [-0.8, 1.2, 1.0], [1.0, 1.0, -0.9]], dtype=dtype, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    out = lk.lookup_free_quantize(x, inv_temperature=5.0, backend=backend)
    torch.autograd.backward([out.sample_entropy, 0 * out.commitment_loss])
    bits = [torch.stack([(20 * wide).sigmoid(), (-20 * wide).sigmoid()], -1)]
    (-(bits[0] * bits[0].log()).sum(-1)).sum(-1).mean().backward()
    assert 0 < wide.grad.abs().max() < 1e-4
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=0)
    x.grad = wide.grad = None
    lk.lookup_free_quantize(x, inv_temperature=5.0, backend=backend).codebook_entropy.backward()
    p = (-20 * wide)[:, None, :].mul(-all_codes(3)).sigmoid().prod(-1).mean(0)
    (-(p * p.log()).sum()).backward()
    assert 0 < wide.grad.abs().max() < 1e-4
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=0)


def test_zero_follows_either_convention(backend):
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30]], requires_grad=True)
    for zero, want in (("negative", [-2.0, -2.0, 2.0, -2.0]), ("zero", [0.0, 0.0, 2.0, -2.0])):
        out = lk.lookup_free_quantize(x, scale=2.0, zero=zero, backend=backend)
        assert out.quantized.tolist() == [want] and out.indices.item() == 0b0010
        assert out.commitment_loss == torch.tensor(want).square().mean()
        (grad,) = torch.autograd.grad(out.commitment_loss, x)
        torch.testing.assert_close(grad, (x.detach() - out.quantized.detach()) / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [4, 8, 10])
def test_agrees_with_vector_quantize_pytorch(backend, dim):
    peer = pytest.importorskip("vector_quantize_pytorch").LFQ(
        dim=dim, commitment_loss_weight=0.25, diversity_gamma=0.8, codebook_scale=0.5
    )
    module = lk.LFQ(
        dim, commitment_loss_weight=0.25, diversity_gamma=0.8, codebook_scale=0.5, inv_temperature=2.0, backend=backend
    )
    x = torch.randn(8, 64, dim, requires_grad=True)
    mask = torch.rand(8, 64) < 0.8
    grad = torch.randn_like(x) * mask[..., None]
    # theirs gets the rows that are in: its own mask folds rows and codebooks into one axis, so that the mean over rows
    # goes missing and its batch entropy becomes the sample entropy
    quantized, indices, loss = peer(x[mask][None], inv_temperature=2.0)
    (grad_x,) = torch.autograd.grad([quantized, loss], x, [grad[mask][None], None])
    our_quantized, our_indices, our_loss = module(x, mask)
    (our_grad,) = torch.autograd.grad([our_quantized, our_loss], x, [grad, None])
    q, indices, our_q, our_indices = quantized[0], indices[0].long(), our_quantized[mask], our_indices[mask]
    assert torch.equal(our_indices, indices)
    torch.testing.assert_close(our_q, q, rtol=1e-6, atol=1e-6)  # x + (q − x) is rounded
    torch.testing.assert_close(our_loss, loss, rtol=0, atol=1e-4)  # theirs clamps inside the logarithm
    torch.testing.assert_close(our_grad, grad_x, rtol=0, atol=2e-6)
    every = torch.arange(2**dim)
    assert torch.equal(module.indices_to_codes(every), peer.indices_to_codes(every))
    module.eval(), peer.eval()
    assert module(x)[2] == 0 == peer(x)[2] and torch.equal(module(x)[0], peer(x)[0])


def test_agrees_with_the_formula_of_open_genie(backend):
    # 0.1 (mean H(p) + H(mean p)) + 0.25 mse(x, sign x), log clamped at 1e-6, sign(0) = 0
    x = torch.randn(200, 6)
    x[::17, 2] = 0
    x.requires_grad_()
    inside = torch.ones(200, dtype=torch.bool)
    q, nearest, commitment, sample, mean = expected(x, inside, 1.0, 3.0, "zero", smallest=1e-6)
    loss = 0.1 * (sample + mean) + 0.25 * commitment
    module = lk.LFQ(
        6, commitment_loss_weight=0.25, diversity_gamma=-1, inv_temperature=3.0, zero="zero", backend=backend
    )
    quantized, indices, our_loss = module(x)
    assert torch.equal(quantized, q) and torch.equal(indices, nearest)
    torch.testing.assert_close(our_loss, loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(our_loss, x)[0], torch.autograd.grad(loss, x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite_are_in_nothing(backend, dtype):
    x = torch.randn(700, 4).to(dtype)
    x[::9, 3], x[1::9, 0], x[2::9, 1] = torch.nan, torch.inf, -torch.inf
    bad = ~x.isfinite().all(-1)
    leaf = x.clone().requires_grad_()
    out = lk.lookup_free_quantize(leaf, inv_temperature=1.0, backend=backend)
    clean = lk.lookup_free_quantize(x[~bad], inv_temperature=1.0, backend=backend)
    assert out.quantized[bad].isnan().all() and (out.indices[bad] == -1).all()
    assert torch.equal(out.indices[~bad], clean.indices) and torch.equal(out.quantized[~bad], clean.quantized)
    torch.testing.assert_close(out[2:], clean[2:], rtol=1e-6, atol=1e-6)
    (out.quantized.nan_to_num().sum() + out.commitment_loss + out.sample_entropy - out.codebook_entropy).backward()
    assert (leaf.grad[bad] == 0).all() and leaf.grad.isfinite().all() and (leaf.grad[~bad] != 0).all()
    module = lk.LFQ(4, backend=backend)
    assert (module(x)[1][bad] == 0).all() and module(x)[2].isfinite()
    nowhere = torch.zeros(700, dtype=torch.bool)
    out = lk.lookup_free_quantize(x, mask=nowhere, backend=backend)
    assert (out.quantized == 0).all() and (out.indices == -1).all() and all(loss == 0 for loss in out[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_and_huge_entries(backend, dtype):
    x = torch.empty(0, 4, 3, dtype=dtype, requires_grad=True)
    out = lk.lookup_free_quantize(x, backend=backend)
    assert out.quantized.shape == (0, 4, 3) and out.indices.shape == (0, 4)
    assert all(loss == 0 for loss in out[2:])
    (out.quantized.sum() + sum(out[2:])).backward()
    assert x.grad.shape == x.shape
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest]], dtype=dtype, requires_grad=True)
    out = lk.lookup_free_quantize(x, backend=backend)
    assert out.quantized.tolist() == [[1.0, -1.0]] and out.indices.tolist() == [2]
    assert out.sample_entropy == 0 and out.codebook_entropy == 0
    (out.sample_entropy + out.codebook_entropy).backward()
    assert x.grad.tolist() == [[0.0, 0.0]]


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
    base = torch.randn(10, 12, 8, requires_grad=True)

    def total(x, quantized, losses):
        return reduce(quantized) + sum(losses)

    x = layout(base)
    out = lk.lookup_free_quantize(x, inv_temperature=0.5, backend=backend)
    (mine,) = torch.autograd.grad(total(x, out.quantized, out[2:]), base)
    flat = x.reshape(-1, x.shape[-1])
    q, _, *losses = expected(flat, torch.ones(len(flat), dtype=torch.bool), 1.0, 0.5)
    straight_through = x + (q.reshape(x.shape) - x).detach()
    (theirs,) = torch.autograd.grad(total(x, straight_through, losses), base)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_sixty_two_bits(backend):
    x = torch.randn(300, 62)
    out = lk.lookup_free_quantize(x, codebook_entropy=False, backend=backend)
    assert out.codebook_entropy is None and (out.indices >= 0).all()
    assert torch.equal(lk.lookup_free_codes(out.indices, 62), out.quantized)
    assert torch.equal(out.quantized, x.sign())


def test_blocks_of_rows_agree_with_one_block(backend, monkeypatch):
    x = torch.randn(2, 50, 7, dtype=torch.float64)
    indices = torch.where(torch.rand(2, 50) < 0.8, 0, -1)
    whole = OPS.codebook_entropy(x, indices, 1.5, "reference")
    grad = OPS.codebook_entropy_backward(x, indices, whole[1], torch.tensor([2.0, -1.0]).double(), 1.5, "reference")
    monkeypatch.setattr(blocked, "MAX_ROWS", 7)
    pieces = OPS.codebook_entropy(x, indices, 1.5, backend)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-14)
    grad_pieces = OPS.codebook_entropy_backward(x, indices, pieces[1], torch.tensor([2.0, -1.0]).double(), 1.5, backend)
    torch.testing.assert_close(grad_pieces, grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(pieces[1].sum(-1), torch.ones(2, dtype=torch.float64))


def test_eighteen_bits():
    """Against the exact gradient at the few codes that two confident rows and one undecided bit leave."""
    x = torch.where(torch.rand(64, 18) < 0.5, 1.0, -1.0)
    x[:, 4] = 0.0
    x.requires_grad_()
    out = lk.lookup_free_quantize(x, inv_temperature=50.0)
    # every row spreads over two codes, and no two rows share one
    torch.testing.assert_close(out.sample_entropy, torch.tensor(2.0).log())
    torch.testing.assert_close(out.codebook_entropy, torch.tensor(128.0).log())
    rows = torch.randn(512, 18)
    double = rows.double().requires_grad_()
    single = rows.clone().requires_grad_()
    for leaf in (single, double):
        lk.lookup_free_quantize(leaf, inv_temperature=0.3).codebook_entropy.backward()
    scale = double.grad.abs().max()
    assert scale > 0
    assert (single.grad.double() - double.grad).abs().max() < 1e-5 * scale


def test_memory_of_the_codebook_entropy_is_bounded(monkeypatch):
    """No tensor beyond the distribution over all codes and the factors of a block of rows."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    x, indices = torch.randn(1, 20000, 14), torch.zeros(1, 20000, dtype=torch.int64)
    with Watch():
        _, probabilities = blocked.codebook_entropy(x, indices, 1.0)
        blocked.codebook_entropy_backward(x, indices, probabilities, torch.ones(1), 1.0)
    # N · 2^D would be 3e8; a block has 8192 rows of 2^7 values
    assert 2**14 <= largest <= 8192 * 2**7


def test_two_runs_and_any_number_of_threads_give_the_same_bits(backend):
    x = torch.randn(30000, 8)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(lk.lookup_free_quantize(x, inv_temperature=0.5, codebook_entropy=False, backend=backend)[:4])
    finally:
        torch.set_num_threads(before)
    if backend == "reference":  # torch's own sums depend on the number of threads
        results = results[1:]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck(backend):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 30, 4, dtype=dtype, requires_grad=True)
        mask, indices = torch.rand(2, 30) < 0.5, torch.randint(-1, 2, (2, 30))
        rows, grad = (indices >= 0).sum(-1), torch.randn(2)
        for operator, arguments in (
            (OPS.lookup_free_quantize, (x, None, 1.0, 2.0, False, backend)),
            (OPS.lookup_free_quantize, (x, mask, 0.5, 2.0, True, backend)),
            (
                OPS.lookup_free_quantize_backward,
                (x.detach(), indices, rows, x.detach(), grad, grad, 1.0, 2.0, True, backend),
            ),
            (
                OPS.lookup_free_quantize_backward,
                (x.detach(), indices, rows, None, grad, grad, 1.0, 2.0, False, backend),
            ),
            (OPS.codebook_entropy, (x, indices, 2.0, backend)),
            (OPS.codebook_entropy_backward, (x.detach(), indices, torch.rand(2, 16), grad, 2.0, backend)),
        ):
            torch.library.opcheck(operator, arguments, test_utils=UTILITIES)


def test_compiled_autocast_and_vmap(backend):
    module = lk.LFQ(5, commitment_loss_weight=0.25, inv_temperature=1.0, backend=backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    autocast = torch.autocast("cpu", torch.bfloat16)(module)
    for rows in (16, 33, 7):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 4, 5).to(dtype)
            results = []
            for function in (module, compiled, autocast):
                leaf = x.clone().requires_grad_()
                out = function(leaf)
                (out[0].float().square().sum() + out[2]).backward()
                results.append((*out, leaf.grad))
            for other in results[1:]:
                torch.testing.assert_close(results[0], other, rtol=1e-6, atol=1e-7)
    x = torch.randn(3, 40, 5, requires_grad=True)
    batched = torch.vmap(module)(x)
    single = [module(rows) for rows in x]
    for i in range(3):
        torch.testing.assert_close(tuple(t[i] for t in batched), single[i])
    (grads,) = torch.autograd.grad(batched[2].sum(), x)
    torch.testing.assert_close(grads, torch.autograd.grad(sum(s[2] for s in single), x)[0])


X = torch.randn(10, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lk.lookup_free_quantize(X.int()), TypeError, "x is torch.int32"),
        (lambda: lk.lookup_free_quantize(X, scale=0), ValueError, "scale is 0; it must be positive"),
        (lambda: lk.lookup_free_quantize(X, inv_temperature=-1.0), ValueError, "inv_temperature is -1.0"),
        (lambda: lk.lookup_free_quantize(X, zero="positive"), ValueError, "zero is 'positive'.*'negative', 'zero'"),
        (lambda: lk.lookup_free_quantize(X, mask=X[:, 0]), TypeError, "mask is torch.float32"),
        (lambda: lk.lookup_free_quantize(X, mask=X[:5, 0] > 0), ValueError, r"mask has shape \(5,\)"),
        (lambda: lk.lookup_free_quantize(torch.randn(2, 25)), ValueError, "25 entries.*at most 24.*codebook_entropy=F"),
        (lambda: lk.lookup_free_quantize(torch.randn(2, 63)), ValueError, "63 entries.*1 to 62"),
        (lambda: lk.lookup_free_quantize(torch.randn(2, 0)), ValueError, "0 entries.*1 to 62"),
        (lambda: lk.lookup_free_quantize(X, backend="cpp"), ValueError, "backend is 'cpp'"),
        (lambda: lk.lookup_free_codes(torch.tensor([16]), 4), IndexError, r"from 16 to 16.*\[-1, 15\]"),
        (lambda: lk.LFQ(30), ValueError, "diversity_gamma=0"),
        (lambda: lk.LFQ(4, codebook_scale=-1.0), ValueError, "codebook_scale is -1.0"),
        (lambda: lk.LFQ(4, inv_temperature=0.0), ValueError, "inv_temperature is 0.0"),
        (lambda: lk.LFQ(4)(torch.randn(3, 5)), ValueError, r"x has shape \(3, 5\).*\(\.\.\., 4\)"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
