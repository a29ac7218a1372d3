"""A fused module and its upstream form in step: one state, one seed, one input."""

from __future__ import annotations

import copy

import torch
import vector_quantize_pytorch as upstream
from torch import Tensor

from lamkernels.compat import vector_quantize_pytorch as ours

TOLERANCE = 2e-5  # of the largest entry of a tensor: fp32 sums in another order, over 100 steps


def paired(name, **options):
    """(fused, upstream), made from the same seed: the constructors draw the same numbers."""
    modules = []
    for package in (ours, upstream):
        torch.manual_seed(3)
        modules.append(getattr(package, name)(**copy.deepcopy(options)))
    assert_same_state(*modules, exact=True)
    return tuple(modules)


def assert_same_state(fused, stock, exact=False):
    mine, theirs = fused.state_dict(), stock.state_dict()
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        assert mine[key].dtype == value.dtype and mine[key].shape == value.shape, key
        assert_close(mine[key], value, key, 0.0 if exact else TOLERANCE)


def assert_close(mine, theirs, name, tolerance=TOLERANCE):
    if not theirs.is_floating_point() or tolerance == 0:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
    elif theirs.numel():
        worst, bound = (mine - theirs).abs().amax(), tolerance * theirs.abs().amax() + 1e-7
        assert worst <= bound, f"{name}: {worst} > {bound}"


def assert_same_output(mine, theirs, name="output"):
    if isinstance(theirs, tuple):
        assert len(mine) == len(theirs)
        assert type(mine).__name__ == type(theirs).__name__
        assert getattr(mine, "_fields", None) == getattr(theirs, "_fields", None)
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert_same_output(a, b, f"{name}[{i}]")
    elif isinstance(theirs, Tensor):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, (name, mine.shape, theirs.shape, mine.dtype)
        assert_close(mine, theirs, name)
    else:
        assert mine == theirs, name


def compare_step(modules, x, requires_grad=True, seed=7, **arguments):
    """Runs both on x with the same random numbers: equal outputs, and equal gradients of x and the parameters."""
    outputs, inputs = [], []
    for module in modules:
        given = x.clone().requires_grad_(requires_grad)
        torch.manual_seed(seed)
        output = module(given, **arguments)
        floats = [t for t in _tensors(output) if t.requires_grad]
        module.zero_grad()
        if floats:
            weights = torch.Generator().manual_seed(5)
            sum((t.float() * torch.randn(t.shape, generator=weights)).mean() for t in floats).backward()
        outputs.append(output)
        inputs.append(given)
    assert_same_output(*outputs)
    pairs = [("x", *(given.grad for given in inputs))]
    stock = dict(modules[1].named_parameters())
    pairs += [(name, parameter.grad, stock[name].grad) for name, parameter in modules[0].named_parameters()]
    for name, mine, theirs in pairs:
        if mine is None or theirs is None:  # no path and a path of zeros are the same gradient
            mine, theirs = (torch.zeros(1) if g is None else g for g in (mine, theirs))
            assert not mine.any() and not theirs.any(), name
        else:
            assert_close(mine, theirs, name, 1e-4)  # the rotation divides by |u + q̂|, which cancels in both forms
    return outputs


def train_both(modules, rows, steps=100, lr=0.05, **arguments):
    """Steps of SGD on both modules: outputs, losses, gradients and state agree after each."""
    generator = torch.Generator().manual_seed(11)
    optimizers = [torch.optim.SGD(p, lr=lr) if (p := list(module.parameters())) else None for module in modules]
    for step in range(steps):
        compare_step(modules, rows(generator), seed=step, **arguments)
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.step()
        assert_same_state(*modules)


def _tensors(output):
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output if part is not None for t in _tensors(part)]
