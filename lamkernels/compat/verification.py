"""Whether a fused form does what a module does: both run on copies, and what comes out is compared."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lamkernels.compat.base import Compat

# of the largest entry: some 100 roundings. Half precision is what a form returns, not what it computes in
TOLERANCE = {torch.float64: 2.0**-32, torch.float32: 2.0**-16, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
# what is added to it where terms cancel: of 1 for outputs, of the largest gradient of the same output for gradients
FLOOR = {torch.float64: 2.0**-40, torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# factors of the probe's rows: small ones tell codes apart that are small and lie close. A probe on which rounding
# decides between codes is no evidence of a difference, so the next one is taken
SCALES = (1.0, 1.0, 0.1, 0.01)
SCHEDULES = (("training step 1", "training step 2", "evaluation after training"), ("evaluation",))
# what a form gives in one step: outputs, gradients and state, by what they are called
Results = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
GRADIENTS = 1
HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)


class Difference(Exception):  # noqa: N818  (a finding, not an error)
    """What the two forms do not agree on, in words."""


def difference(module: nn.Module, made: type[nn.Module]) -> str | None:
    """What ``module`` does differently as a ``made``, and by how much; None if nothing.

    Copies of both run two training steps and an evaluation, and an evaluation from the start, with the same random
    numbers. Outputs, the gradient of each output with respect to each argument and parameter, parameters, buffers and
    attributes are compared in full precision; modules in half precision are converted, since distances that upstream
    rounds to 8 bits choose other codes. ``module``, its gradients, its hooks and all random states are left alone.

    Args:
        module: the module as it is.
        made: a class from :func:`lamkernels.compat.in_place.fused_class`.
    """
    with _undisturbed(module):
        try:
            copies = _copy(module), _copy(module)
        except Exception as error:
            return f"it cannot be copied for the verification: {_named(error)}"
        copies[1].__class__ = made
        for seed, scale in enumerate(SCALES):
            found, close = _trial(*copies, None, seed, scale)
            if found and not close:  # looks again, and allows for upstream's own roundings
                return _trial(*copies, copy.deepcopy(copies[0]).double(), seed, scale)[0]
            if not found:
                return None
        return (
            f"{found}; rounding decides between codes on every probe, so this may be no difference in what is computed"
        )


def _trial(
    original: nn.Module, fused: nn.Module, exact: nn.Module | None, seed: int, scale: float
) -> tuple[str | None, bool]:
    """What one probe shows, and whether roundings might have decided about a choice."""
    close_calls = CloseCalls()
    try:
        for schedule in SCHEDULES:
            _run(*copy.deepcopy((original, fused, exact)), schedule, close_calls, seed, scale)
    except Difference as found:
        return str(found), close_calls.any
    return None, close_calls.any


def _run(
    original: nn.Module,
    fused: nn.Module,
    exact: nn.Module | None,
    schedule: tuple[str, ...],
    close_calls: CloseCalls,
    seed: int,
    scale: float,
) -> None:
    """Compares the forms at every step; ``exact``, the original in fp64, says how far its roundings reach."""
    for number, step in enumerate(schedule):
        for form in (original, fused, exact):
            if form is not None:
                form.train(step.startswith("training"))
        names = _state(original).keys() & _state(fused).keys()  # not what a forward leaves behind for the first time
        _seed_all(original, seed)
        arguments = _varied(cast(Compat, fused).probe(), torch.Generator().manual_seed(100 * seed + number), scale)
        with close_calls:
            expected = _step(original, arguments, seed, names, f"{step}: its own forward fails on the probe")
        found = _step(fused, arguments, seed, names, f"{step}: the fused form fails on the probe")
        slack = None
        if exact is not None:
            try:
                with InDouble():
                    doubled = tuple(a.double() if _is_floating(a) else a for a in arguments)
                    slack = _roundings(expected, _step(exact, doubled, seed, names, step))
            except Difference:  # a forward that does not run in fp64
                exact = None
        for part, where in enumerate((f"{step}: ", f"{step}: the gradient of ", f"after {step}: ")):
            _compare(expected[part], found[part], where, slack)


def _roundings(expected: Results, exact: Results) -> dict[str, float] | None:
    """Twice the error of each value; None where the two are apart by more than roundings: other codes, other noise."""
    slack: dict[str, float] = {}
    for part, (values, truths) in enumerate(zip(expected, exact, strict=True)):
        for name, value in values.items():
            truth = truths.get(name)
            if not _is_floating(value):
                if _unlike(value, truth, 0.0):
                    return None
                continue
            if not isinstance(truth, Tensor) or truth.shape != value.shape:
                return None
            error = _largest(value.double() - truth)
            if part != GRADIENTS and error > 2.0**-12 * _largest(value) + 2.0**-20:
                return None
            slack[name] = 2 * error
    return slack


def _step(form: nn.Module, arguments: tuple[Any, ...], seed: int, names: Set[str], failure: str) -> Results:
    """The outputs of a forward, the gradients of each, and the state after it, by what they are called."""
    _seed_all(form, seed)
    try:
        outputs, gradients = _forward_and_backward(form, arguments)
    except Exception as error:
        raise Difference(f"{failure}: {_named(error)}") from error
    return outputs, gradients, {name: _kept(value) for name, value in _state(form).items() if name in names}


def _kept(value: Any) -> Any:
    """A value of a state as it is now; a tensor without its graph."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def _forward_and_backward(form: nn.Module, arguments: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    arguments = tuple(_fresh(argument) for argument in arguments)
    outputs = dict(_leaves(form.forward(*arguments), "output"))  # not a call: the hooks are the user's
    targets = {f"argument {i}": a for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad}
    targets |= {name: parameter for name, parameter in form.named_parameters() if parameter.requires_grad}
    gradients: dict[str, Any] = {}
    for name, output in outputs.items():
        if not _is_floating(output):
            continue
        found: tuple[Tensor | None, ...] = (None,) * len(targets)
        if output.requires_grad and targets:
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
            found = torch.autograd.grad(output, list(targets.values()), weights, retain_graph=True, allow_unused=True)
        for (target, tensor), gradient in zip(targets.items(), found, strict=True):
            gradients[f"{name} with respect to {target}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return outputs, gradients


def _compare(expected: dict[str, Any], found: dict[str, Any], where: str, slack: dict[str, float] | None) -> None:
    if expected.keys() != found.keys():
        names = sorted(expected.keys() ^ found.keys())
        raise Difference(f"{where}{names[0]} is there in one form only")
    for name, value in expected.items():
        if words := _unlike(value, found[name], _floor(name, expected), (slack or {}).get(name, 0.0)):
            raise Difference(f"{where}{name} {words}")


def _floor(name: str, expected: dict[str, Any]) -> float:
    """The magnitude that cancels: of the gradients of one output, the largest; a state has none; an output's is 1."""
    output, is_gradient, _ = name.partition(" with respect to ")
    if is_gradient:
        return max(_largest(value) for other, value in expected.items() if other.partition(" with ")[0] == output)
    return 1.0 if name.startswith("output") else 0.0


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().nan_to_num(0, 0, 0).max()) if value.numel() else 0.0


def _unlike(expected: Any, found: Any, floor: float, slack: float = 0.0) -> str | None:
    """How two leaves differ, in words that follow the name of what they are; None where they agree."""
    if isinstance(expected, np.ndarray) and isinstance(found, np.ndarray):
        if expected.dtype != found.dtype:
            return f"is {expected.dtype}, and {found.dtype} from the fused form"
        expected, found = torch.as_tensor(expected), torch.as_tensor(found)
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        alike = type(expected) is type(found) and (not isinstance(expected, _PLAIN) or expected == found)
        return None if alike else f"is {expected!r}, and {found!r} from the fused form"
    for what in ("shape", "dtype", "device"):
        if getattr(expected, what) != getattr(found, what):
            return f"has {what} {getattr(expected, what)}, and {getattr(found, what)} from the fused form"
    expected, found = expected.detach(), found.detach()
    if expected.dtype not in TOLERANCE:
        wrong = int((expected != found).sum())
        return f"differs in {wrong} of {expected.numel()} entries" if wrong else None
    allowed = TOLERANCE[expected.dtype] * _largest(expected) + FLOOR[expected.dtype] * floor + slack
    same = (expected == found) | (expected.isnan() & found.isnan())
    off = (expected - found).abs().masked_fill(same, 0)
    if off.numel() == 0 or bool((off <= allowed).all()):  # a NaN is not
        return None
    return f"differs by {float(off.nan_to_num(torch.inf).max()):.1e} ({allowed:.1e} is allowed)"


_PLAIN = (bool, int, float, str, type(None), torch.Size, torch.dtype)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        yield f"the number of entries of {name}", len(value)
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
    else:
        yield name, value


def _state(form: nn.Module) -> dict[str, Any]:
    """Parameters, buffers, and the attributes that hold numbers, of the module and those in it."""
    state: dict[str, Any] = {f"the parameter {name}": value for name, value in form.named_parameters()}
    state |= {f"the buffer {name}": value for name, value in form.named_buffers()}
    for prefix, inner in form.named_modules():
        for name, value in vars(inner).items():
            if not name.startswith("_") and isinstance(value, (*_PLAIN, Tensor, np.ndarray)):
                state[f"the attribute {prefix}{'.' * bool(prefix)}{name}"] = value
    return state


def _varied(arguments: tuple[Any, ...], generator: torch.Generator, scale: float) -> tuple[Any, ...]:
    """The probe with other rows at each step: a factor near 1 for each entry, and one for all."""
    return tuple(
        a * (scale * (1 + torch.randn(a.shape, generator=generator) / 4)).to(a) if _is_floating(a) else a
        for a in arguments
    )


def _fresh(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.is_floating_point())


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class InDouble(TorchFunctionMode):
    """Makes fp64 of the fp32 that a forward asks for by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **named)


class CloseCalls(TorchFunctionMode):
    """Watches a form choose: ``any`` says whether roundings might have decided about one of its choices."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, values = getattr(func, "__name__", ""), args[0] if args else kwargs.get("input")
        if not self.any and name in ("argmin", "min", "argmax", "max", "topk", "round") and _is_floating(values):
            values = values.detach()
            dim = kwargs.get("dim", args[1] if len(args) > 1 and name != "topk" else -1)
            if name == "round":  # a choice between the two neighbours
                values, dim = torch.stack([values.ceil() - values, values - values.floor(), torch.ones_like(values)]), 0
            self.any = _close(
                values if isinstance(dim, int) else values.flatten(), dim, name in ("argmax", "max", "topk")
            )
        return func(*args, **kwargs)


def _close(values: Tensor, dim: int, largest: bool) -> bool:
    """Whether in any row the two foremost values are within roundings of its largest magnitude."""
    if values.ndim == 0 or values.numel() == 0 or values.shape[dim] < 2:
        return False
    foremost = values.topk(2, dim, largest).values.movedim(dim, -1)
    allowed = 64 * torch.finfo(values.dtype).eps * values.abs().amax(dim)
    return bool(((foremost[..., 0] - foremost[..., 1]).abs() <= allowed).any())


def _copy(module: nn.Module) -> nn.Module:
    """A copy in full precision, without the hooks, which are the user's, or the graph of the last forward."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for name, value in vars(inner).items():
            if name in HOOKS:
                memo[id(value)] = type(value)()
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(module, memo)
    halves = [
        t for t in itertools.chain(copied.parameters(), copied.buffers()) if t.dtype in (torch.half, torch.bfloat16)
    ]
    return copied.float() if halves else copied


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Random states and the precision of products are put back; gradients are on, autocast is off."""
    types = {tensor.device.type for tensor in itertools.chain(module.parameters(), module.buffers())} | {"cpu"}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (upstream's forward may draw from it)
    with ExitStack() as stack:
        for kind in types - {"cpu", "meta"}:
            devices = list(range(torch.get_device_module(kind).device_count()))
            stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_full_precision())
        for kind in types - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of fp32 are those of fp32, so that upstream's distances are not rounded to 10 bits."""
    try:
        previous = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer switches, which must not be mixed with this one
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def _seed_all(form: nn.Module, seed: int) -> None:
    """Seeds what the forms may draw from: CPU, the module's devices, Python and numpy, and none that is not forked."""
    torch.default_generator.manual_seed(seed)
    for kind in {tensor.device.type for tensor in itertools.chain(form.parameters(), form.buffers())} - {"cpu", "meta"}:
        torch.get_device_module(kind).manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
