"""What every drop-in form has to be: thin, free of host syncs, and able to take over a module that exists already."""

from __future__ import annotations

import copy

import pytest
import torch
from lamkernels.bench.stock import lapa as plain_lapa
from lamkernels.bench.stock import lapo as plain_lapo
from lamkernels.bench.stock import univla as plain_univla
from parity import Trace, both, no_host_sync

from lamkernels.compat import lapa, lapo, moto, taming, univla, vector_quantize_pytorch, villa_x

CASES = {
    "lapa": (lapa.NSVQ, lambda: plain_lapa.NSVQ(12, 8, 6, code_seq_len=4, patch_size=1, image_size=8)),
    "univla": (univla.VectorQuantizer, lambda: plain_univla.VectorQuantizer(16, 8)),
    "lapo": (lapo.VQEmbeddingEMA, lambda: plain_lapo.VQEmbeddingEMA(plain_lapo.VQConfig())),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def taken_over(module, ours):
    other = copy.deepcopy(module)
    other.__class__ = type(type(module).__name__, (ours, type(module)), {})
    return other


def step(module):
    outputs = module(*(x.requires_grad_() for x in module.probe()))
    sum(o.sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad).backward()
    return outputs


def test_a_module_that_exists_is_taken_over(case, backend, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", backend)
    ours, make = case
    stocked = make()
    fused = taken_over(stocked, ours)
    stocked.probe = lambda: ours.probe(stocked)
    assert ours.refusal(stocked) is None and type(stocked).__name__ in ours.upstream_names
    for _ in range(2):
        expected, got = both((stocked, fused), step)
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(fused.state_dict(), stocked.state_dict(), rtol=1e-5, atol=2e-6)


def test_no_step_waits_for_a_device(case):
    ours, make = case
    module = taken_over(make(), ours)
    module.numpy_usage = False
    step(module)
    with no_host_sync():
        step(module)
    with Trace() as trace:
        torch.ones(3)[torch.ones(3) > 0].sum().item()
    assert len(trace.waiting) == 2  # it sees what it should


@pytest.mark.parametrize("name", ["univla", "villa_x", "moto", "taming", "vector_quantize_pytorch"])
def test_only_the_loss_follows_the_codebook_where_the_input_has_no_gradient(name):
    """z + (q − z).detach() has a gradient where z has; one of zeros would make an optimiser move the codebook."""
    module = {
        "univla": lambda: univla.VectorQuantizer(16, 8),
        "villa_x": lambda: villa_x.VectorQuantizer2(16, 8, 0.25),
        "moto": lambda: moto.VectorQuantizer2(16, 8, 0.25),
        "taming": lambda: taming.VectorQuantizer2(16, 8, 0.25),
        "vector_quantize_pytorch": lambda: vector_quantize_pytorch.SimVQ(8, 16),
    }[name]()
    x = torch.randn(2, 8, 3, 4) if name == "taming" else torch.randn(2, 3, 8)
    z_q, *others = module(x)
    taught = others[{"univla": 0, "villa_x": 0, "taming": 0}.get(name, 1)]
    assert not z_q.requires_grad and taught.requires_grad
    assert module(x.requires_grad_())[0].requires_grad


def test_other_classes_of_the_name_are_refused(case):
    ours, make = case
    nothing = torch.nn.Linear(3, 4)
    assert "missing" in ours.refusal(nothing) or "has no" in ours.refusal(nothing)
    for change, reason in (
        (lambda m: m.register_buffer("initted", torch.zeros(1)), "initted"),
        (lambda m: m.add_module("inner_vq", torch.nn.Linear(2, 2)), "inner_vq"),
    ):
        module = make()
        change(module)
        assert reason in ours.refusal(module)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("lapa", lambda m: setattr(m, "eps", 1e-5), "eps is 1e-05"),
        ("lapa", lambda m: setattr(m, "codebooks_used", m.codebooks_used.float()), "float32"),
        ("lapa", lambda m: setattr(m, "embedding_dim", 7), r"codebooks has shape \(8, 6\); expected is \(8, 7\)"),
        ("univla", lambda m: setattr(m, "num_latents", 15), "usage has shape"),
        ("univla", lambda m: setattr(m, "code_restart", None), "code_restart is missing"),
        ("lapo", lambda m: setattr(m.cfg, "num_embs", 3), "embedding has shape"),
        ("lapo", lambda m: setattr(m, "cfg", None), "cfg has no num_codebooks"),
    ],
)
def test_refusals_name_what_differs(name, change, reason):
    import re

    ours, make = CASES[name]
    module = make()
    change(module)
    assert re.search(reason, ours.refusal(module))
