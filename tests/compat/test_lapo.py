from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lamkernels.bench.stock import lapo as stock
from parity import both, copied, twins

from lamkernels.compat.lapo import VQEmbeddingEMA

BUFFERS = ("embedding", "ema_count", "ema_weight")


@pytest.fixture(autouse=True)
def on_backend(backend, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", backend)


def pair(**fields):
    return twins(stock.VQEmbeddingEMA, VQEmbeddingEMA, stock.VQConfig(**fields))


def row_length(cfg):
    return cfg.num_codebooks * cfg.emb_dim * cfg.num_discrete_latents


def step(module, rows=32):
    x = 0.1 * torch.randn(rows, row_length(module.cfg), generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    z_q, loss, perplexity, indices = module(x)
    assert not perplexity.requires_grad
    ((z_q * torch.linspace(-1, 1, z_q.numel()).view_as(z_q)).sum() + loss).backward()
    return z_q, loss, perplexity, indices, x.grad, module.state_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_codebooks": 1, "num_discrete_latents": 1, "emb_dim": 5, "num_embs": 7},
        {"num_codebooks": 3, "num_discrete_latents": 5, "emb_dim": 2, "decay": 0.5, "commitment_cost": 2.0},
        {"emb_dim": 2, "num_embs": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_step_is_that_of_the_stock_form(fields, training):
    modules = pair(**fields)
    torch.testing.assert_close(modules[1].state_dict(), modules[0].state_dict(), rtol=0, atol=0)
    expected, got = both(modules, lambda m: step(m.train(training)))
    cfg = modules[0].cfg
    assert got[0].shape == (32, row_length(cfg)) and got[0].is_contiguous()
    assert got[3].shape == (32, cfg.num_codebooks, cfg.num_discrete_latents, 1)
    assert torch.equal(got[3], expected[3])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_changes_nothing():
    _, module = pair()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()
    step(module)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_a_hundred_steps_of_training(one_thread):
    data = torch.randn(100, 64, 24, generator=torch.Generator().manual_seed(3))

    def train(module):
        encoder = torch.nn.Linear(24, row_length(module.cfg))
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05)
        history = []
        for batch in data:
            z_q, loss, perplexity, indices = module(encoder(batch))
            total = loss + (z_q.mean(1) - batch.mean(1)).square().mean()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            history.append([copied(out) for out in (loss, perplexity, indices)])
        return history, module.state_dict()

    (stock_history, stock_state), (history, state) = both(pair(decay=0.9), train)
    for got, expected in zip(history, stock_history, strict=True):
        assert torch.equal(got[2], expected[2])
        torch.testing.assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, stock_state, rtol=1e-5, atol=1e-6)


def test_codes_thrown_out_by_the_cold_start_cost_the_others_nothing():
    """Three of five codes are near 1e5 after a step, and the mean of the codebook with them."""
    fields = {"num_codebooks": 1, "num_discrete_latents": 1, "emb_dim": 8, "num_embs": 5, "decay": 0.9}

    def train(module):
        batches = 0.1 * torch.randn(5, 64, 8, generator=torch.Generator().manual_seed(5))
        outputs = [[copied(out) for out in module(x)] for x in batches]
        return outputs, module.ema_count, module.embedding

    torch.testing.assert_close(*both(pair(**fields)[::-1], train), rtol=1e-5, atol=1e-6)


def test_buffers_stay_where_they_are():
    _, module = pair()
    before = [getattr(module, name).data_ptr() for name in BUFFERS]
    for _ in range(3):
        step(module)
    assert [getattr(module, name).data_ptr() for name in BUFFERS] == before
    assert not any(buffer.requires_grad for buffer in module.buffers())


def test_two_forwards_before_a_backward():
    _, module = pair()
    x = torch.randn(8, 128, requires_grad=True)
    total = sum(module(x)[0].sum() + module(x)[1] for _ in range(2))
    total.backward()
    assert x.grad.isfinite().all()


def test_vectors_of_indices():
    modules = pair()
    for module in modules:
        module.eval()
    x = torch.randn(8, 128)
    z_q, _, _, indices = modules[1](x)
    expected, got = both(modules, lambda m: m.inds_to_z_q(indices))
    assert torch.equal(got, expected) and got.shape == (8, 32, 4, 1)
    assert torch.equal(got.reshape(8, -1), z_q)
    modules[1].train()
    with pytest.raises(AssertionError):
        modules[1].inds_to_z_q(indices)


def test_maps_of_any_height_and_width():
    expected, got = both(pair(), lambda m: m.forward_2d(torch.randn(3, 32, 2, 5)))
    assert got[0].shape == (3, 32, 2, 5) and got[3].shape == (3, 2, 2, 5)
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="x has 31 channels"):
        pair()[1].forward_2d(torch.randn(3, 31, 2, 5))


def test_a_vector_that_is_not_finite_is_in_no_average():
    _, module = pair()
    x = torch.randn(8, 2, 16, 4)
    x[3, 1, 5, 2] = torch.nan
    z_q, loss, perplexity, indices = module(x.reshape(8, -1))
    z_q = z_q.reshape(x.shape)
    assert z_q[3, 1, :, 2].isnan().all() and z_q.isnan().sum() == 16
    assert loss.isfinite() and perplexity.isfinite() and indices[3, 1, 2, 0] == 0
    assert all(getattr(module, name).isfinite().all() for name in BUFFERS)


def test_the_configuration_may_change_between_steps():
    modules = pair()
    for module in modules:
        module.cfg = SimpleNamespace(**vars(module.cfg))
        module.ema_count.fill_(1.0)
        step(module)
        module.cfg.decay, module.cfg.commitment_cost = 0.25, 3.0
    torch.testing.assert_close(*both(modules, step), rtol=1e-5, atol=1e-6)


def test_checkpoints_load_strictly_both_ways():
    first, second = pair()
    step(first)
    second.load_state_dict(first.state_dict())
    assert set(second.state_dict()) == set(BUFFERS)
    torch.testing.assert_close(*both((first, second), step), rtol=1e-5, atol=1e-6)
    first.load_state_dict(second.state_dict())


def test_bf16_rows_with_codebooks_in_fp32():
    _, module = pair()
    z_q, loss, _, _ = module(torch.randn(8, 128).bfloat16())
    assert z_q.dtype == loss.dtype == torch.float32
