"""What the swap verifies on the probe, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import random

import numpy as np
import pytest
import torch
import toy_upstream as toy
from toy_compat import ToyFused, ToyFusedOfAnotherProject, why

from lamkernels.compat import swap, verification


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SwappedLosses", "training step 1: the gradient of output[2] with respect to argument 0 differs by"),
        ("CountsInEvaluation", "after evaluation after training: the buffer usage differs by"),
        ("GradientInTheWrongPlace", "the gradient of output[2] with respect to embedding.weight differs by"),
        ("IndicesOfInt32", "output[1] has dtype torch.int32, and torch.int64 from the fused form"),
        ("FarthestCode", "training step 1: output[0] differs by"),
        ("Fails", "its own forward fails on the probe: RuntimeError: only frames of 96 pixels"),
        ("AnotherArgument", "forward takes z, mask; that of the fused form z"),
        ("KeepsCount", "the attribute steps is 1, and 0 from the fused form"),
    ],
)
def test_a_fork_that_does_something_else_is_refused_with_what_it_does(name, words):
    module = toy.fork(name)
    if name == "KeepsCount":
        module.steps = 0
    assert words in why(swap(module))
    assert type(module) is vars(toy.Forks)[name].ToyQuantizer


def test_a_small_difference_is_found_and_measured():
    module = toy.ToyQuantizer()
    module.beta = 0.25
    slightly = copy.deepcopy(module)
    slightly.combine = lambda commitment, codebook: 0.2501 * commitment + codebook
    assert swap(module).swapped
    text = why(swap(slightly))
    assert "output[2] differs by" in text
    off, allowed = (float(word) for word in text.replace("(", "").split("differs by ")[1].split(" is")[0].split())
    assert allowed < off < 1e-3


def test_of_several_fused_forms_the_one_that_agrees_is_taken():
    module = toy.fork("AnotherOrder")
    report = swap(module)
    assert report.swapped[0].fused == "toy_compat.ToyFusedOfAnotherProject"
    assert isinstance(module, ToyFusedOfAnotherProject)


def test_without_verification_two_that_fit_are_refused_and_one_is_trusted():
    text = why(swap(toy.ToyQuantizer(), verify=False))
    assert text.count("which only verify=True can decide") == 2
    residual = toy.ResidualToy(broken=True)
    report = swap(residual, verify=False)
    assert report.swapped and not report.verified and "swapped (not verified): 1" in str(report)


def test_the_probe_leaves_everything_alone():
    module = toy.ToyQuantizer().eval()
    module(torch.randn(3, 4))[2].backward()
    before = copy.deepcopy(module.state_dict()), module.embedding.weight.grad.clone()
    versions = [t._version for t in (*module.parameters(), *module.buffers())]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.set_float32_matmul_precision("high")
    try:
        with torch.no_grad():
            assert swap(module).swapped
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    for mine, theirs in zip(np.random.get_state(), states[2], strict=True):  # noqa: NPY002
        assert np.array_equal(mine, theirs)
    for name, value in before[0].items():
        assert torch.equal(module.state_dict()[name], value)
    assert torch.equal(module.embedding.weight.grad, before[1]) and not module.training
    assert [t._version for t in (*module.parameters(), *module.buffers())] == versions


def test_codes_so_close_that_rounding_decides_are_told_from_a_difference(monkeypatch):
    close = toy.ToyQuantizer(64, 4)
    with torch.no_grad():
        close.embedding.weight.mul_(1e-6)  # rows of the first probe are near 1: distances differ in their last bits
    other = vars(toy.Forks)["SwappedLosses"].ToyQuantizer(64, 4)
    other.load_state_dict(close.state_dict())
    assert "gradient of output[2] with respect to argument 0 differs by" in why(swap(other))
    assert swap(copy.deepcopy(close)).swapped
    probe = ToyFused.probe
    monkeypatch.setattr(ToyFused, "probe", lambda self: (probe(self)[0].repeat(30, 1, 1),))
    monkeypatch.setattr(verification, "SCALES", verification.SCALES[:1])
    text = why(swap(close))
    assert "output[1] differs in" in text or "output[0] differs by" in text
    assert "rounding decides between codes on every probe" in text


def test_codes_that_cannot_be_told_apart_are_said_to_be_so():
    module = toy.fork("FarthestCode")
    with torch.no_grad():
        module.embedding.weight.copy_(torch.linspace(0, 1e-7, 8)[:, None].expand(8, 4))
    assert "rounding decides between codes on every probe" in why(swap(module))


def test_a_module_that_cannot_be_copied_is_refused():
    module = toy.ToyQuantizer()
    module.lock = io.TextIOWrapper(io.BytesIO())
    assert "cannot be copied for the verification: TypeError" in why(swap(module))


def test_what_a_forward_keeps_with_its_graph_does_not_stop_the_verification():
    module = toy.fork("KeepsItsLastRows")
    module(torch.randn(4, 4, requires_grad=True))
    assert module.last.grad_fn is not None
    assert "after training step 1: the attribute last has shape" in why(swap(module)), "the fused form leaves it"
    del module.last
    assert swap(module).swapped, "what is kept for the first time is not compared"


def test_the_meta_device():
    with torch.device("meta"):
        residual = toy.ResidualToy()
    assert "on the meta device" in swap(residual).refused[0].why
    assert swap(residual, verify=False).swapped
