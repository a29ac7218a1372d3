from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from lamkernels.bench.stock import lapa as stock
from parity import both, copied, twins

from lamkernels.compat.lapa import NSVQ

SIDES = {1: 8, 2: 8, 4: 8, 16: 16, 64: 16, 256: 32}  # of the grid of features, by code_seq_len


@pytest.fixture(autouse=True)
def on_backend(backend, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", backend)


def pair(code_seq_len=1, dim=12, codes=8, code_dim=6, **options):
    size = SIDES[code_seq_len]
    return twins(
        stock.NSVQ, NSVQ, dim, codes, code_dim,
        code_seq_len=code_seq_len, patch_size=1, image_size=size, **options,
    )  # fmt: skip


def frames(module, batch=3):
    generator = torch.Generator().manual_seed(1)
    shape = batch, int(module.image_size / module.patch_size) ** 2, module.dim
    return [torch.randn(shape, generator=generator).to(module.codebooks).requires_grad_() for _ in range(2)]


def step(module, **options):
    first, last = frames(module)
    quantized, perplexity, used, indices = module(first, last, **options)
    target = torch.linspace(-1, 1, quantized.numel()).to(quantized).view_as(quantized)
    (quantized * target).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert not perplexity.requires_grad
    return quantized, perplexity, used, indices, first.grad, last.grad, grads


@pytest.mark.parametrize("initialization", ["normal", "uniform"])
@pytest.mark.parametrize("code_seq_len", SIDES)
def test_state_and_step_are_those_of_the_stock_form(code_seq_len, initialization):
    modules = pair(code_seq_len, initialization=initialization)
    torch.testing.assert_close(modules[1].state_dict(), modules[0].state_dict(), rtol=0, atol=0)
    expected, got = both(modules, lambda m: step(m.double()))
    assert got[0].shape == (3, code_seq_len, 12) and got[3].dtype == torch.int64
    assert isinstance(got[2], np.ndarray) and got[2].dtype == np.int32
    assert torch.equal(got[3], expected[3])
    # the stock form measures the noise in fp32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, check_dtype=False)


def test_checkpoints_load_strictly_both_ways():
    first, _ = pair(4)
    _, second = pair(4, initialization="uniform")
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(*both((first, second), lambda m: m.inference(*frames(m))))
    first.load_state_dict(second.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for codebooks"):
        pair(4, codes=9)[1].load_state_dict(first.state_dict())


def test_shapes_of_lapa_itself():
    modules = twins(stock.NSVQ, NSVQ, 64, 8, 32, code_seq_len=4)
    expected, got = both(modules, step)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("code_seq_len", [1, 4])
def test_a_hundred_steps_of_training(code_seq_len, one_thread):
    def train(module):
        module.double()  # so that rounding cannot tip an index
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
        history = []
        for number in range(100):
            first, last = (f.detach() + 0.1 * torch.randn(f.shape).to(f) for f in frames(module))
            quantized, perplexity, used, indices = module(first, last)
            loss = (quantized - (last - first).mean(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append([copied(out) for out in (loss, perplexity, used, indices)])
            if number % 25 == 24:
                module.replace_unused_codebooks(25)
        return history, module.state_dict()

    (stock_history, stock_state), (history, state) = both(pair(code_seq_len), train)
    for got, expected in zip(history, stock_history, strict=True):
        assert torch.equal(got[2], expected[2]) and torch.equal(got[3], expected[3])
        torch.testing.assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(state, stock_state, rtol=1e-5, atol=1e-6)  # the stock form measures noise in fp32


def test_a_code_is_counted_once_a_forward_and_in_evaluation_too():
    _, module = pair(4)
    module.eval()
    _, _, used, indices = module(*frames(module, batch=40))
    assert indices.numel() > 2 * 8  # some code appears more than once
    for _ in range(2):
        module(*frames(module, batch=40))
    assert sorted(set(used.tolist())) <= [0, 3] and (used > 0).sum() == len(indices.unique())
    assert np.shares_memory(used, module.codebooks_used.numpy())  # a live view, as upstream's


def test_codes_are_interleaved_before_the_projection():
    _, module = pair(4, dim=6)
    with torch.no_grad():
        module.project_out.weight.copy_(torch.eye(6))
        module.project_out.bias.zero_()
    flat = torch.randn(3 * 4, 6)
    out = module.decode(flat, 3)
    for b in range(3):
        rows = flat[4 * b : 4 * b + 4].flatten()
        for i in range(4):
            assert torch.equal(out[b, i], torch.stack([rows[d * 4 + i] for d in range(6)]))


def test_training_the_codebook_only():
    modules = pair(4)
    results = both(modules, lambda m: step(m, codebook_training_only=True))
    for grads in (result[6] for result in results):
        assert grads.pop("project_in.weight") is None and grads["codebooks"].abs().sum() > 0
    got, expected = results[1], results[0]
    assert (got[2] == expected[2]).all() and torch.equal(got[3], expected[3])
    torch.testing.assert_close(got[1], expected[1])
    assert got[4] is None and expected[4] is None
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[6]["codebooks"], expected[6]["codebooks"])


@pytest.mark.parametrize("used", [[0] * 8, [9, 0, 0, 5, 0, 0, 0, 0], [9, 8, 7, 6, 5, 0, 1, 9], [9] * 8])
def test_replacement_of_unused_codes(used, caplog):
    def replace(module):
        module.codebooks_used.copy_(torch.tensor(used))
        module.replace_unused_codebooks(20)
        return module.codebooks.detach(), module.codebooks_used

    with caplog.at_level(logging.INFO):
        expected, got = both(pair(), replace)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[1].count_nonzero() == 0
    assert f"replaced {sum(u / 20 < 0.1 for u in used)} of 8 codes" in caplog.text


def test_replacement_repairs_codes_that_are_not_finite():
    _, module = pair()
    with torch.no_grad():
        module.codebooks[3] = torch.nan
    module.codebooks_used.copy_(torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]))
    module.replace_unused_codebooks(2)
    torch.testing.assert_close(module.codebooks[3], module.codebooks[0])


def test_reinitialisation_keeps_the_parameter():
    modules = pair()
    parameter = modules[1].codebooks
    for module in modules:
        module(*frames(module))
    expected, got = both(modules, lambda m: (m.codebook_reinit(), m.codebooks, m.codebooks_used)[1:])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got[0] is parameter


@pytest.mark.parametrize("tokens", [None, 5, list(range(8)) + [0] * 4])
def test_inference(tokens):
    modules = pair(4)
    expected, got = both(modules, lambda m: m.inference(*frames(m), user_action_token_num=tokens))
    assert torch.equal(got[1], expected[1]) and got[1].shape == (3, 4) and got[1].dtype == torch.int64
    torch.testing.assert_close(got[0], expected[0])
    assert modules[1].codebooks_used.count_nonzero() == 0
    got[0].sum().backward()
    assert modules[1].codebooks.grad is None and modules[1].project_out.weight.grad is not None
    with pytest.raises(IndexError):
        modules[1].inference(*frames(modules[1]), user_action_token_num=8)


def test_a_row_on_its_code_has_a_gradient():
    _, module = pair()
    with torch.no_grad():
        module.codebooks[2] = 0
    first, _ = frames(module)
    last = first.detach().clone().requires_grad_()
    quantized, *_, indices = module(first, last)
    assert (indices == 2).all()  # nothing changed between the frames: r is 0
    quantized.sum().backward()
    for grad in (first.grad, last.grad, module.codebooks.grad):
        assert grad.isfinite().all()
    assert last.grad.abs().sum() > 0


def test_a_frame_that_is_not_finite_is_in_no_count():
    _, module = pair()
    first, last = frames(module)
    with torch.no_grad():
        last[1] = torch.nan
    quantized, perplexity, used, indices = module(first, last)
    assert quantized[1].isnan().all() and quantized[[0, 2]].isfinite().all()
    assert indices[1] == 0 and perplexity.isfinite()
    assert set(np.flatnonzero(used)) == set(indices[[0, 2]].flatten().tolist())


def test_noise_can_be_given():
    _, module = pair(4)
    torch.manual_seed(3)
    noise = torch.randn(12, 6)
    torch.manual_seed(3)
    expected = module(*frames(module))[0]
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert torch.equal(module(*frames(module), noise=noise)[0], expected)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="noise is"):
        module(*frames(module), noise=noise[:3])


def test_usage_as_a_tensor():
    _, module = pair()
    module.numpy_usage = False
    used = module(*frames(module))[2]
    assert used is module.codebooks_used and used.dtype == torch.int32


def test_under_autocast_the_quantiser_keeps_the_precision_of_its_codebook():
    def run(module):
        with torch.autocast("cpu", torch.bfloat16):
            return module(*frames(module))

    expected, got = both(pair(4), run)
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    same = got[3] == expected[3]  # upstream compares bf16 products
    assert same.sum() >= 9
    assert got[1].dtype == expected[1].dtype == torch.float32


def test_errors():
    with pytest.raises(ValueError, match="initialization is 'zeros'"):
        NSVQ(8, 4, 4, initialization="zeros")
    with pytest.raises(ValueError, match="code_seq_len is 3"):
        NSVQ(8, 4, 4, code_seq_len=3)
