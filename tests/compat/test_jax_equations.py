"""The quantisers of jafar and jasmine are JAX: what docs/guides/jax.md says computes their equations does."""

import pytest
import torch
from torch import nn

import lamkernels as lk


@pytest.fixture(autouse=True)
def chosen_backend(backend, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", backend)


def normalized(x):
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


def plain(x, codebook, normalize_codes):
    """ẑ_q = x̂ + sg(z − x̂), z a code as it is or normalised, and the loss with β = 1/4."""
    x, unit = normalized(x), normalized(codebook)
    indices = (-(x @ unit.T)).argmin(-1)
    z = (unit if normalize_codes else codebook)[indices]
    loss = (x.detach() - z).square().mean() + 0.25 * (x - z.detach()).square().mean()
    return x + (z - x).detach(), indices, loss


@pytest.mark.parametrize("shape", [(36, 15, 32), (7, 32)], ids=str)
def test_jafar_is_vector_quantize_with_the_cosine(shape):
    vq = lk.VectorQuantize(32, 6, update="gradient", metric="cosine", commitment_weight=0.25)
    nn.init.uniform_(vq.codebook, -1, 1)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape)
    results = []
    for quantized, indices, loss in (vq(x), plain(x, vq.codebook, normalize_codes=True)):
        total = (quantized * weight).sum() + 10 * loss
        results.append((quantized, indices, loss, *torch.autograd.grad(total, [x, vq.codebook])))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_jafar_over_a_hundred_steps():
    batches = [torch.randn(64, 32) for _ in range(100)]
    start = torch.empty(6, 32).uniform_(-1, 1)
    runs = []
    for fused in (True, False):
        vq = lk.VectorQuantize(32, 6, update="gradient", metric="cosine", commitment_weight=0.25)
        vq.codebook.data.copy_(start)
        optimizer = torch.optim.AdamW([vq.codebook], lr=3e-3, betas=(0.9, 0.9), weight_decay=1e-4)
        chosen, losses = [], []
        for x in batches:
            _, indices, loss = vq(x) if fused else plain(x, vq.codebook, normalize_codes=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            chosen.append(indices), losses.append(loss.detach())
        runs.append((torch.stack(chosen), torch.stack(losses), vq.codebook.detach()))
    assert torch.equal(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)


def test_jasmine_is_a_cosine_lookup_of_codes_as_they_are():
    codebook = nn.Parameter(torch.randn(6, 32))
    x = torch.randn(540, 32, requires_grad=True)

    unit = nn.functional.normalize(x, dim=-1)
    indices = lk.nearest_code(unit, codebook, metric="cosine")
    z = lk.lookup(indices, codebook)
    quantized = unit + (z - unit).detach()
    loss = (unit.detach() - z).square().mean() + 0.25 * (unit - z.detach()).square().mean()

    expected = plain(x, codebook, normalize_codes=False)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close((quantized, loss), (expected[0], expected[2]), rtol=1e-5, atol=1e-6)
    totals = quantized.square().sum() + loss, expected[0].square().sum() + expected[2]
    both = [torch.autograd.grad(total, [x, codebook]) for total in totals]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
