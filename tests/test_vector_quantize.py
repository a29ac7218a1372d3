from __future__ import annotations

import pytest
import torch
from contract import DTYPES, assert_contract
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import lamkernels as lk

# fused sums, sums in a pass of their own (the last), one row, one code, tails
SHAPES = [(1, 1, 1), (300, 8, 32), (257, 64, 16), (123, 7, 5), (2000, 300, 130), (200, 5000, 8)]


def expected(x, codebook, indices, inside):
    """Losses, counts and sums by plain torch in fp64, for given indices; differentiable."""
    q = codebook[indices.clamp(min=0)]
    commitment = F.mse_loss(x[inside], q[inside].detach()) if inside.any() else x.sum() * 0
    loss = F.mse_loss(q[inside], x[inside].detach()) if inside.any() else codebook.sum() * 0
    counts = torch.bincount(indices[inside], minlength=len(codebook))
    sums = torch.zeros_like(codebook).index_add(0, indices[inside], x[inside].detach())
    return q, commitment, loss, counts, sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients(backend, shape, dtype, masked):
    rows, codes, dim = shape
    x = torch.randn(rows, dim).to(dtype).requires_grad_()
    codebook = torch.randn(codes, dim).to(dtype).requires_grad_()
    mask = torch.rand(rows) < 0.7 if masked else None
    out = lk.vector_quantize(x, codebook, mask=mask, backend=backend)
    inside = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    assert (out.indices[~inside] == -1).all() and (out.quantized[~inside] == 0).all()
    assert_contract(x.detach()[inside], codebook.detach(), out.indices[inside])

    wide, wide_codebook = (t.detach().double().requires_grad_() for t in (x, codebook))
    q, commitment, loss, counts, sums = expected(wide, wide_codebook, out.indices, inside)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    rounding = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    assert torch.equal(out.quantized[inside], codebook.detach()[out.indices[inside]])
    assert out.commitment_loss.dtype == out.codebook_loss.dtype == out.sums.dtype == accumulated
    torch.testing.assert_close(out.commitment_loss.double(), commitment, **rounding)
    torch.testing.assert_close(out.codebook_loss.double(), loss, **rounding)
    assert torch.equal(out.counts, counts)
    size = rows * rounding["rtol"]  # of sums of so many rows
    torch.testing.assert_close(out.sums.double(), sums, rtol=rounding["rtol"], atol=size)

    grad = torch.randn(rows, dim).to(dtype)
    torch.autograd.backward([out.quantized, 3 * out.commitment_loss + 5 * out.codebook_loss], [grad, None])
    straight_through = wide + (q - wide).detach()
    weight = inside[:, None] * grad.double()
    torch.autograd.backward([straight_through, 3 * commitment + 5 * loss], [weight, None])
    half = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)  # the gradients are stored in dtype
    for mine, theirs in ((x.grad, wide.grad), (codebook.grad, wide_codebook.grad)):
        assert mine.dtype == dtype
        torch.testing.assert_close(
            mine.double(), theirs, rtol=rounding["rtol"] * 10 + half, atol=rounding["atol"] + half / 100
        )


def test_statistics_of_residuals_do_not_cancel(backend):
    # codes where k-means has converged: the gradient is a small difference of large sums
    codebook = 100 * torch.randn(4, 16)
    x = codebook.repeat_interleave(3000, 0)
    noise = 1e-2 * torch.randn(4, 3000, 16)
    x = x + (noise - noise.mean(1, keepdim=True)).reshape(-1, 16)
    leaf = codebook.clone().requires_grad_()
    out = lk.vector_quantize(x, leaf, backend=backend)
    out.codebook_loss.backward()
    exact = torch.stack([(x[i * 3000 : (i + 1) * 3000].double() - codebook[i].double()).sum(0) for i in range(4)])
    exact *= -2 / x.numel()
    # the naive n·c − s in fp32 is off by 1e-4 of the residuals' scale and more
    assert (leaf.grad.double() - exact).abs().max() <= 1e-6 * (2 * 3000 * 1e-2 / x.numel())


@pytest.mark.parametrize(
    "gradient",
    [
        lambda q: q.sum(),  # an expanded gradient, stride 0
        lambda q: (q * torch.arange(q.shape[-1])).sum(),
        lambda q: (q.transpose(0, 1) * torch.randn(q.shape[1], q.shape[0], 1)).sum(),
        lambda q: q[:, ::2].square().sum(),
        lambda q: (q.mean(-1) ** 2).sum(),  # stride 0 along the last axis only
    ],
)
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[..., ::2]])
def test_any_strides_of_the_gradient_and_of_x(backend, gradient, layout):
    base = torch.randn(10, 12, 8, requires_grad=True)
    x = layout(base)
    codebook = torch.randn(9, x.shape[-1])
    torch.manual_seed(1)
    gradient(lk.vector_quantize(x, codebook, backend=backend).quantized).backward()
    mine, base.grad = base.grad, None
    codes = codebook[lk.nearest_code(x, codebook, backend=backend)]
    torch.manual_seed(1)
    gradient(layout(base) + (codes - layout(base)).detach()).backward()
    torch.testing.assert_close(mine, base.grad)


def test_rows_that_are_not_finite_are_in_nothing(backend):
    x, codebook = torch.randn(100, 8), torch.randn(5, 8)
    codebook[3, 0] = torch.nan
    bad = torch.zeros(100, dtype=torch.bool)
    bad[::9] = True
    x[bad, 2] = torch.inf
    leaf = x.clone().requires_grad_()
    out = lk.vector_quantize(leaf, codebook, backend=backend)
    clean = lk.vector_quantize(x[~bad], codebook, backend=backend)
    assert out.quantized[bad].isnan().all() and (out.indices[bad] == -1).all()
    assert torch.equal(out.quantized[~bad], clean.quantized)
    assert torch.equal(out.counts, clean.counts) and out.counts.sum() == (~bad).sum() and out.counts[3] == 0
    torch.testing.assert_close(out.commitment_loss, clean.commitment_loss)
    torch.testing.assert_close(out.sums, clean.sums, rtol=1e-6, atol=1e-5)
    assert out.sums.isfinite().all()
    (out.quantized.nan_to_num().sum() + out.commitment_loss).backward()
    assert (leaf.grad[bad] == 0).all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(backend, dtype):
    x = torch.empty(0, 4, 3, dtype=dtype, requires_grad=True)
    codebook = torch.randn(5, 3).to(dtype).requires_grad_()
    out = lk.vector_quantize(x, codebook, backend=backend)
    assert out.quantized.shape == (0, 4, 3) and out.indices.shape == (0, 4)
    assert out.commitment_loss == 0 and out.codebook_loss == 0
    assert (out.counts == 0).all() and (out.sums == 0).all()
    (out.quantized.sum() + out.commitment_loss + out.codebook_loss).backward()
    assert x.grad.shape == x.shape and (codebook.grad == 0).all()


def test_amp_half_rows_with_an_fp32_codebook(backend):
    x = torch.randn(400, 16).bfloat16().requires_grad_()
    codebook = torch.randn(20, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = lk.vector_quantize(x, codebook, backend=backend)
        assert out.quantized.dtype == torch.bfloat16 and out.commitment_loss.dtype == torch.float32
    (out.quantized.float().sum() + out.commitment_loss + out.codebook_loss).backward()
    assert x.grad.dtype == torch.bfloat16 and codebook.grad.dtype == torch.float32
    rows, codes = x.detach().double(), codebook.detach().double()
    torch.testing.assert_close(out.codebook_loss.double(), F.mse_loss(rows, codes[out.indices]), rtol=1e-6, atol=0)
    assert torch.equal(out.quantized, codebook.detach().bfloat16()[out.indices])


def test_gradients_survive_an_in_place_update_of_the_codebook(backend):
    x, codebook = torch.randn(50, 4, requires_grad=True), torch.randn(6, 4)
    out = lk.vector_quantize(x, codebook, backend=backend)
    residual = x.detach() - codebook[out.indices]
    codebook.add_(1.0)
    out.commitment_loss.backward()
    torch.testing.assert_close(x.grad, 2 * residual / x.numel())


def test_gradient_none_stops_at_the_output(backend):
    x, codebook = torch.randn(20, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    out = lk.vector_quantize(x, codebook, gradient="none", backend=backend)
    assert not out.quantized.requires_grad
    out.commitment_loss.backward()
    assert x.grad.abs().sum() > 0 and (codebook.grad == 0).all()


def test_a_codebook_per_head_counts_every_row_once(backend):
    x, codebook = torch.randn(3, 40, 8), torch.randn(3, 10, 8, requires_grad=True)
    mask = torch.rand(3, 40) < torch.tensor([[0.2], [0.9], [0.5]])
    out = lk.vector_quantize(x, codebook, mask=mask, backend=backend)
    assert out.counts.shape == (3, 10) and out.sums.shape == (3, 10, 8)
    residual = (x - lk.lookup(out.indices, codebook.detach()))[mask]
    torch.testing.assert_close(out.commitment_loss, residual.square().mean())
    out.codebook_loss.backward()
    for head in range(3):
        rows, indices = x[head][mask[head]], out.indices[head][mask[head]]
        leaf = codebook.detach()[head].clone().requires_grad_()
        ((leaf[indices] - rows).square().sum() / (mask.sum() * 8)).backward()
        torch.testing.assert_close(codebook.grad[head], leaf.grad)


def test_a_loss_past_the_squares_of_fp32(backend):
    x, codebook = torch.zeros(1000, 4), torch.zeros(3, 4)
    x[7, 2] = 2e19
    out = lk.vector_quantize(x, codebook, backend=backend)
    torch.testing.assert_close(out.commitment_loss, torch.tensor(4e38 / 4000))


def test_cosine_compares_normalised_vectors(backend):
    x, codebook = torch.randn(60, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    out = lk.vector_quantize(x, codebook, metric="cosine", backend=backend)
    rows, codes = F.normalize(x, dim=-1), F.normalize(codebook, dim=-1)
    indices = (rows @ codes.T).argmax(-1)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, codes[indices])
    torch.testing.assert_close(out.commitment_loss, F.mse_loss(rows, codes[indices].detach()))
    torch.autograd.backward(out.commitment_loss + out.codebook_loss)
    mine = x.grad, codebook.grad
    x.grad = codebook.grad = None
    (F.mse_loss(rows, codes[indices].detach()) + F.mse_loss(codes[indices], rows.detach())).backward()
    torch.testing.assert_close(mine, (x.grad, codebook.grad))


def rotated(x, q):
    """The rotation trick in plain torch, for autograd (Fifty et al. 2024, section 4.2)."""
    eps = 1e-6
    norm, target = (t.norm(dim=-1, keepdim=True) for t in (x, q))
    u, towards = (x / norm.clamp(min=eps)).detach(), (q / target.clamp(min=eps)).detach()
    w = F.normalize(u + towards, dim=-1, eps=eps)
    turned = x - 2 * (x * w).sum(-1, keepdim=True) * w + 2 * (x * u).sum(-1, keepdim=True) * towards
    return turned * (target / norm.clamp(min=eps)).detach()


def substituted(x, q, noise):
    """NSVQ in plain torch, for autograd (Vali and Bäckström 2022)."""
    length = (x - q).norm(dim=-1, keepdim=True)
    return x + (length / noise.norm(dim=-1, keepdim=True) + 1e-12) * noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("gradient", ["ste", "rotation", "noise", "none"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 8, 32), (123, 7, 5), (90, 300, 130)], ids=str)
def test_every_gradient_under_every_metric(backend, shape, gradient, metric, dtype):
    rows, codes, dim = shape
    x = torch.randn(rows, dim).to(dtype).requires_grad_()
    codebook = torch.randn(codes, dim).to(dtype).requires_grad_()
    noise = torch.randn(rows, dim).to(dtype) if gradient == "noise" else None
    mask = torch.rand(rows) < 0.8
    out = lk.vector_quantize(x, codebook, gradient=gradient, metric=metric, noise=noise, mask=mask, backend=backend)
    wide, wide_codebook = (t.detach().double().requires_grad_() for t in (x, codebook))
    row, code = (F.normalize(t, dim=-1) if metric == "cosine" else t for t in (wide, wide_codebook))
    q = code[out.indices.clamp(min=0)]
    value = {
        "ste": lambda: row + (q - row).detach(),
        "rotation": lambda: rotated(row, q),
        "noise": lambda: substituted(row, q, noise.double()),
        "none": lambda: q.detach(),
    }[gradient]()
    half = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)  # outputs are stored in dtype
    unit = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        out.quantized[mask].double(), value[mask].detach(), rtol=10 * unit + 3 * half, atol=10 * unit + 3 * half
    )
    assert out.quantized.dtype == dtype and (out.quantized[~mask] == 0).all()
    assert out.quantized.requires_grad is (gradient != "none")
    commitment, loss = (F.mse_loss(row[mask], q[mask].detach()), F.mse_loss(q[mask], row[mask].detach()))
    torch.testing.assert_close(out.commitment_loss.double(), commitment.detach(), rtol=10 * unit + half, atol=unit)

    grad = torch.randn(rows, dim).to(dtype)
    mine, theirs = 3 * out.commitment_loss + 5 * out.codebook_loss, 3 * commitment + 5 * loss
    if gradient != "none":
        mine, theirs = mine + (out.quantized * grad).sum(), theirs + (value[mask] * grad[mask].double()).sum()
    mine.backward()
    theirs.backward()
    for ours, exact in ((x.grad, wide.grad), (codebook.grad, wide_codebook.grad)):
        # with noise, a half output is saved as its code: one rounding more in x − q, which r divides
        scale = exact.abs().max().clamp(min=1)
        torch.testing.assert_close(ours.double(), exact, rtol=20 * unit + 4 * half, atol=scale * (20 * unit + 4 * half))


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3),
    rows=st.integers(0, 120),
    codes=st.integers(1, 40),
    dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    metric=st.sampled_from(["l2", "dot"]),
    gradient=st.sampled_from(["ste", "rotation", "noise"]),
    layout=st.sampled_from(["plain", "transposed", "every second entry", "expanded"]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_numba_is_the_reference_on_integers(heads, rows, codes, dim, dtype, metric, gradient, layout, masked, seed):
    # of integers every score is exact, so that both find the same code, and exact ties are many
    torch.manual_seed(seed)
    values = torch.randint(-3, 4, (heads, rows, 2 * dim)).to(dtype)
    x = {
        "plain": lambda: values[..., :dim].contiguous(),
        "transposed": lambda: values[..., :dim].transpose(0, 1).contiguous().transpose(0, 1),
        "every second entry": lambda: values[..., ::2],
        "expanded": lambda: values[:, :1, :dim].expand(heads, rows, dim) if rows else values[..., :dim],
    }[layout]()
    codebook = torch.randint(-3, 4, (heads, codes, dim)).to(dtype)
    options = {"mask": torch.rand(heads, rows) < 0.7} if masked else {}
    if gradient == "noise":
        options["noise"] = torch.randn(heads, rows, dim).to(dtype)
    grad, results = torch.randn(heads, rows, dim).to(dtype), []
    for backend in ("reference", "numba"):
        leaf, codes_leaf = x.detach().requires_grad_(), codebook.clone().requires_grad_()
        out = lk.vector_quantize(leaf, codes_leaf, metric=metric, gradient=gradient, backend=backend, **options)
        torch.autograd.backward([out.quantized, out.commitment_loss + 2 * out.codebook_loss], [grad, None])
        results.append((out, leaf.grad, codes_leaf.grad))
    (reference, *grads), (out, *ours) = results
    assert torch.equal(out.indices, reference.indices) and torch.equal(out.counts, reference.counts)
    half = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 1e-6)
    for a, b in zip((out.quantized, *ours), (reference.quantized, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=half, atol=4 * half)
    for a, b in ((out.commitment_loss, reference.commitment_loss), (out.sums, reference.sums)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", ["rotation", "noise"])
def test_rows_on_their_code_have_a_finite_gradient(backend, gradient):
    codebook = torch.randn(5, 6, requires_grad=True)
    x = codebook.detach()[[0, 3, 3]].clone()
    x[1] = 0
    codes = torch.cat([codebook, torch.zeros(1, 6)])
    x.requires_grad_()
    noise = torch.randn(3, 6)
    noise[2] = 0
    options = {"noise": noise} if gradient == "noise" else {}
    out = lk.vector_quantize(x, codes, gradient=gradient, backend=backend, **options)
    torch.testing.assert_close(out.quantized, codes[out.indices])
    out.quantized.sum().backward()
    assert x.grad.isfinite().all() and codebook.grad.isfinite().all()
    if gradient == "noise":
        assert torch.equal(x.grad, torch.ones_like(x)) and (codebook.grad == 0).all()
    else:
        torch.testing.assert_close(x.grad[0], torch.ones(6))


def test_rotation_is_that_of_vector_quantize_pytorch(backend):
    peer = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    x, codebook = torch.randn(200, 16, dtype=torch.float64, requires_grad=True), torch.randn(9, 16).double()
    out = lk.vector_quantize(x, codebook, gradient="rotation", backend=backend)
    grad = torch.randn(200, 16).double()
    out.quantized.backward(grad)
    mine, x.grad = x.grad, None
    peer.rotate_to(x, codebook[out.indices]).backward(grad)
    torch.testing.assert_close(mine, x.grad)


def test_noise_of_half_rows_has_the_length_of_the_residual_from_the_fp32_code(backend):
    codebook = torch.randn(20, 64)
    x, noise = codebook.bfloat16(), torch.randn(20, 64).bfloat16()
    out = lk.vector_quantize(x, codebook, gradient="noise", noise=noise, backend=backend)
    residual = (x.double() - codebook.double()).norm(dim=-1, keepdim=True)
    exact = x.double() + residual / noise.double().norm(dim=-1, keepdim=True) * noise.double()
    torch.testing.assert_close(out.quantized, exact.bfloat16(), rtol=2.0**-7, atol=0)
    assert (out.quantized != x).any()


@pytest.mark.parametrize(("rows", "codes"), [(5000, 4), (300, 700)], ids=["many rows", "many codes"])
def test_noise_pulls_the_codes_of_any_number_of_rows(backend, rows, codes):
    x, noise, grad = torch.randn(3, rows, 16).unbind()
    codebook = torch.randn(codes, 16, requires_grad=True)
    out = lk.vector_quantize(x, codebook, gradient="noise", noise=noise, backend=backend)
    out.quantized.backward(grad)
    residual = x.double() - codebook.detach().double()[out.indices]
    along = (grad.double() * noise.double()).sum(-1) / noise.double().norm(dim=-1)
    pulls = (along / residual.norm(dim=-1))[:, None] * residual
    wanted = torch.zeros(codes, 16, dtype=torch.float64).index_add_(0, out.indices, -pulls)
    torch.testing.assert_close(codebook.grad.double(), wanted, rtol=1e-5, atol=1e-4)


def test_noise_comes_from_the_generator():
    x, codebook = torch.randn(50, 8), torch.randn(4, 8)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return lk.vector_quantize(x, codebook, gradient="noise", generator=generator).quantized

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    out = lk.vector_quantize(x, codebook, gradient="noise")
    residual = (x - codebook[out.indices]).norm(dim=-1)
    torch.testing.assert_close((out.quantized - x).norm(dim=-1), residual)


def test_second_derivatives_are_refused():
    x, codebook = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    out = lk.vector_quantize(x, codebook)
    (grad,) = torch.autograd.grad(out.commitment_loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        lk.vector_quantize(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(5, 3)), codebook)


@pytest.mark.parametrize("codes", [12, 5000])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e19, 1e30])
def test_cosine_of_rows_of_any_size(backend, scale, codes):
    x, codebook = scale * torch.randn(200, 8), scale * torch.randn(codes, 8)
    x[3], x[5, 0], codebook[4, 1] = torch.nan, torch.inf, torch.nan
    x.requires_grad_(), codebook.requires_grad_()
    mask = torch.arange(200) != 7
    with torch.no_grad():
        x[7] = torch.nan
    out = lk.vector_quantize(x, codebook, metric="cosine", mask=mask, backend=backend)
    inside = mask & x.detach().isfinite().all(-1)
    rows, codes = F.normalize(x.detach().double(), dim=-1), F.normalize(codebook.detach().double(), dim=-1)
    sums = torch.zeros_like(codes).index_add(0, out.indices[inside], rows[inside])
    torch.testing.assert_close(out.sums.double(), sums, rtol=1e-6, atol=1e-5)
    products = (rows @ codes.nan_to_num(0.0).T)[inside]
    products[:, 4] = -2
    regret = products.amax(1) - products.gather(1, out.indices[inside][:, None])[:, 0]
    assert (out.indices[~inside] == -1).all() and (regret <= 1e-6).all()
    torch.testing.assert_close(out.commitment_loss.double(), (rows - codes[out.indices])[inside].square().mean())
    (out.commitment_loss + out.codebook_loss + (out.quantized[inside] ** 2).sum()).backward()
    assert x.grad.isfinite().all() and codebook.grad.isfinite().all() and (x.grad[~inside] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (500, 20, 37), (300, 2000, 17), (300, 140, 270), (0, 3, 2)], ids=str)
def test_code_statistics(backend, shape, dtype):
    rows, codes, dim = shape
    x = torch.randn(rows, dim).to(dtype).requires_grad_()
    indices = torch.randint(-1, codes + 1, (rows,))  # both ends out of range
    if rows > 10:
        with torch.no_grad():
            x[3, 0] = torch.nan
    counts, sums = lk.code_statistics(x, indices, codes, backend=backend)
    counted = (indices >= 0) & (indices < codes) & x.isfinite().all(-1)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, torch.bincount(indices[counted], minlength=codes))
    exact = torch.zeros(codes, dim, dtype=torch.float64).index_add(0, indices[counted], x.detach()[counted].double())
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(sums)
    (sums * weight).sum().backward()
    expected_grad = torch.where(counted[:, None], weight[indices.clamp(0, codes - 1)], 0).to(dtype)
    assert torch.equal(x.grad, expected_grad)


def test_lookup_is_the_inverse_of_the_indices():
    codebook = torch.randn(7, 3, requires_grad=True)
    indices = torch.tensor([[0, 6], [-1, 2]])
    out = lk.lookup(indices, codebook)
    assert out.shape == (2, 2, 3) and out[1, 0].isnan().all()
    assert torch.equal(out[0], codebook[[0, 6]]) and torch.equal(out[1, 1], codebook[2])
    out.nan_to_num().sum().backward()
    assert torch.equal(codebook.grad.sum(1), torch.tensor([3.0, 0, 3, 0, 0, 0, 3]))
    per_head = torch.randn(2, 5, 3)
    both = torch.tensor([[[4, -1]], [[0, 1]]])
    out = lk.lookup(both, per_head)
    assert torch.equal(out[0, 0, 0], per_head[0, 4]) and torch.equal(out[1, 0], per_head[1, [0, 1]])
    assert out[0, 0, 1].isnan().all()
