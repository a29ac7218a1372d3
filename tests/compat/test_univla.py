from __future__ import annotations

import pytest
import torch
from lamkernels.bench.stock import univla as stock
from parity import both, copied, twins
from torch.nn import functional as F

from lamkernels.compat.univla import VectorQuantizer


@pytest.fixture(autouse=True)
def on_backend(backend, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", backend)


def pair(codes=16, dim=8, **options):
    return twins(stock.VectorQuantizer, VectorQuantizer, codes, dim, **options)


def losses(z, x):
    return F.mse_loss(x.detach(), z), 0.25 * F.mse_loss(x, z.detach())


def step(module, x):
    x = x.to(module.codebook.weight).requires_grad_()
    z_q, z, same, indices = module(x)
    assert same is x
    codebook_loss, commitment = losses(z, x)
    (z_q * torch.linspace(-1, 1, z_q.numel()).to(z_q).view_as(z_q)).sum().backward(retain_graph=True)
    through, x.grad = x.grad, None
    assert module.codebook.weight.grad is None  # straight-through: none of it goes to the codebook
    (codebook_loss + commitment).backward()
    return z_q, z, indices, codebook_loss, commitment, through, x.grad, module.codebook.weight.grad, module.usage


@pytest.mark.parametrize("shape", [(5, 4, 8), (6, 8), (1, 1, 8), (2, 3, 5, 8), (64, 30, 8)], ids=str)
def test_step_is_that_of_the_stock_form(shape):
    modules, x = pair(), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(modules[0].codebook.weight, modules[1].codebook.weight)
    expected, got = both(modules, lambda m: step(m, x.clone()))
    assert torch.equal(got[2], expected[2]) and torch.equal(got[-1], expected[-1])
    torch.testing.assert_close(got, expected)


def test_usage_counts_rows_of_the_first_axis():
    _, module = pair()
    module.update_usage(torch.tensor([[3, 3, 5, 3], [5, 1, 1, 1]]))
    assert module.usage.tolist() == [0, 1, 0, 1, 0, 2] + [0] * 10
    module.update_usage(torch.tensor([5, 5, 0]))
    assert module.usage.tolist() == [1, 1, 0, 1, 0, 4] + [0] * 10


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("code_restart", [True, False])
def test_when_usage_counts(training, code_restart):
    modules = pair(code_restart=code_restart)
    usages = both(modules, lambda m: (m.train(training), m(torch.randn(5, 4, 8)), m.usage)[-1])
    assert torch.equal(*usages)
    assert bool(usages[1].sum() > 0) is (code_restart or not training)


@pytest.mark.parametrize("dead", [[], [2], [0, 3, 4, 15], list(range(16))], ids=str)
@pytest.mark.parametrize("code_restart", [True, False])
def test_restart_draws_the_codes_of_the_stock_form(dead, code_restart):
    def restart(module):
        module.usage.fill_(2)
        module.usage[dead] = 0
        module.random_restart()
        weight = module.codebook.weight.detach().clone()
        module.reset_usage()
        return weight, module.usage

    modules = pair(code_restart=code_restart)
    before = modules[1].codebook.weight.detach().clone()
    if not code_restart:
        _, usage = restart(modules[1])
        assert torch.equal(modules[1].codebook.weight, before) and usage.sum() == 2 * (16 - len(dead))
        return
    expected, got = both(modules, restart)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    alive = [k for k in range(16) if k not in dead]
    assert torch.equal(got[0][alive], before[alive]) and got[1].count_nonzero() == 0


def test_a_hundred_steps_of_training(one_thread):
    data = torch.randn(100, 8, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def train(module):
        module.double()
        encoder = torch.nn.Linear(5, 8).double()
        optimizer = torch.optim.Adam([*encoder.parameters(), *module.parameters()], lr=1e-2)
        history = []
        for number, batch in enumerate(data):
            x = encoder(batch)
            z_q, z, _, indices = module(x)
            loss = sum(losses(z, x)) + (z_q - batch.sum(-1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append([copied(out) for out in (loss, indices, module.usage)])
            if number % 20 == 19:
                module.random_restart()
                module.reset_usage()
        return history, module.state_dict()

    expected, got = both(pair(), train)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_checkpoints_load_strictly_both_ways():
    first, second = pair()[0], VectorQuantizer(16, 8)
    assert set(second.state_dict()) == {"codebook.weight"}
    second.load_state_dict(first.state_dict())
    first.load_state_dict(second.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for codebook\.weight"):
        VectorQuantizer(15, 8).load_state_dict(first.state_dict())


def test_rows_that_are_not_finite():
    modules, x = pair(), torch.randn(3, 4, 8)
    x[1, 2, 3], x[2, 0, 1] = torch.nan, torch.inf
    expected, got = both(modules, lambda m: (*m(x), m.usage))
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert got[3][1, 2] == 0 and got[0][1, 2, 3].isnan() and got[0][2, 0, 1].isnan()


def test_bf16_rows_with_a_codebook_in_fp32():
    modules, x = pair(), torch.randn(3, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # under which the distances of the stock form are fp32
        expected, got = both(modules, lambda m: m(x))
    torch.testing.assert_close(got, expected)
    assert got[0].dtype == torch.float32


def test_hooks_and_options_of_the_embedding_still_work():
    _, module = pair()
    seen = []
    module.codebook.register_forward_hook(lambda *args: seen.append(args[2].shape))
    module(torch.randn(2, 4, 8))
    assert seen == [(2, 4, 8)]


def test_errors():
    _, module = pair()
    with pytest.raises(ValueError, match="rows of 7 and codebook of 8"):
        module(torch.randn(3, 7))
