"""The one-line swap: known bottlenecks in a model become fused ones where they are."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import re
import weakref
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lamkernels.compat.base import Compat
from lamkernels.compat.in_place import InPlace, fused_class, restore
from lamkernels.compat.report import SwapEntry, SwapReport
from lamkernels.compat.verification import difference

LIKE_A_BOTTLENECK = re.compile(r"quantiz|codebook|vq|fsq|lfq", re.IGNORECASE)


def swap(model: nn.Module, *, verify: bool = True, dry_run: bool = False) -> SwapReport:
    """Turns the bottlenecks in a model that lamkernels knows into fused ones, where they are.

    A module is known by the name of its class, wherever that comes from, and by its structure. Its ``__class__``
    becomes a subclass of the fused class and of its own, so that its identity, parameters, buffers, hooks, shared
    references, ``isinstance`` and optimisers stay as they are, for the model itself too. ``state_dict`` does not
    change. A pickle of it is one of the upstream class. A second swap changes nothing.

    Refused, with the reason: a module whose probe shows a difference; a class derived from the upstream one that
    overrides something of it; a forward set on the instance, a scripted or parametrized module, a sharded parameter.
    A residual quantiser is swapped as one; where it is refused, its layers are looked at.

    With an initialised process group every rank must call this: training forwards communicate, on the probe as well.

    Args:
        model: any module; of shared modules the first name is reported.
        verify: run both forms of each module on copies with a probe, and refuse the module where outputs, gradients or
            the state after two steps differ by more than rounding. False trusts the name and the structure.
        dry_run: report, and change nothing.

    Returns:
        The report; print it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    known = compat_classes()
    swapped: list[SwapEntry] = []
    refused: list[SwapEntry] = []
    already: list[SwapEntry] = []
    unknown: list[SwapEntry] = []
    modules: list[weakref.ref[nn.Module]] = []
    inside_fused: set[nn.Module] = set()
    inside_refused: set[nn.Module] = set()  # where known modules are looked for, and unknown ones are parts
    for name, module in model.named_modules():
        kind = type(module)
        if module in inside_fused:
            continue
        if isinstance(module, Compat):
            already.append(SwapEntry(name, *_classes_of(module)))
            inside_fused.update(module.modules())
        elif upstream := _upstream(module, known):
            chosen, why = _choose(module, upstream, known, verify)
            if chosen is None:
                refused.append(SwapEntry(name, _qualified(kind), why=why))
                inside_refused.update(module.modules())
                continue
            swapped.append(SwapEntry(name, _qualified(kind), _qualified(chosen)))
            inside_fused.update(module.modules())
            if not dry_run:
                modules.append(weakref.ref(module))
                module.__class__ = fused_class(chosen, kind)
        elif module not in inside_refused and _looks_like_a_bottleneck(kind):
            unknown.append(SwapEntry(name, _qualified(kind)))
    # a VQVAE around a quantizer says nothing of its own
    listed = [entry.name for entry in (*swapped, *refused, *already, *unknown)]
    unknown = [entry for entry in unknown if not any(_contains(entry.name, other) for other in listed)]
    return SwapReport(
        tuple(swapped), tuple(refused), tuple(already), tuple(unknown), verify, dry_run, _modules=tuple(modules)
    )


def unswap(model: nn.Module) -> tuple[str, ...]:
    """Gives every module that :func:`swap` made a fused one its class back; their parameters and buffers stay.

    Args:
        model: any module.

    Returns:
        The names of the modules that were swapped.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a module got another class since, by a parametrization or ``fully_shard``; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    return restore(list(model.named_modules()))


def compat_classes() -> list[type[Compat]]:
    """The fused forms of lamkernels, and every other subclass of ``Compat`` that is defined when this is called."""
    package = importlib.import_module(__package__)
    for project in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{project.name}")
    found: set[type[Compat]] = set()
    seen = [Compat]
    while seen:
        below = [kind for kind in seen.pop().__subclasses__() if not issubclass(kind, InPlace)]
        found.update(kind for kind in below if kind.upstream_names)
        seen += below
    return sorted(found, key=_qualified)


def _upstream(module: nn.Module, known: list[type[Compat]]) -> type[nn.Module] | None:
    """The class of the module, or the one it derives from, that has a known name."""
    names = {name for compat in known for name in compat.upstream_names}
    if isinstance(module, torch.jit.ScriptModule):  # classes of its own, that only remember the name
        return type(module) if getattr(module, "original_name", None) in names else None
    return next((kind for kind in type(module).__mro__ if kind.__name__ in names), None)


def _choose(
    module: nn.Module, upstream: type[nn.Module], known: list[type[Compat]], verify: bool
) -> tuple[type[Compat] | None, str]:
    """The fused form of a module, or None and why there is none."""
    if why := _untouchable(module, upstream, verify):
        return None, why
    fitting: list[type[Compat]] = []
    reasons: list[tuple[str, str]] = []
    for compat in known:
        if upstream.__name__ in compat.upstream_names:
            if why := _unfit(compat, module):
                reasons.append((_qualified(compat), why))
            else:
                fitting.append(compat)
    alike = [compat for compat in fitting if _arguments(compat) == _arguments(type(module))]
    if verify:
        for compat in (*alike, *(compat for compat in fitting if compat not in alike)):
            why = difference(module, fused_class(compat, type(module)))
            if why is None:
                return compat, ""
            reasons.append((_qualified(compat), why))
    elif len(fitting) == 1 or len(alike) == 1:
        return (alike or fitting)[0], ""
    else:
        reasons += [
            (_qualified(compat), "it fits as others do, which only verify=True can decide") for compat in fitting
        ]
    if len(reasons) == 1:
        return None, reasons[0][1]
    return None, "; ".join(f"not {name}: {why}" for name, why in reasons)


def _untouchable(module: nn.Module, upstream: type[nn.Module], verify: bool) -> str | None:
    """Why a module of any structure keeps its class; None where nothing stands against it."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted: its methods are compiled into it; swap before torch.jit.script"
    if "forward" in vars(module):
        return "its forward is set on the instance, which would go on to be called; remove that wrapper first"
    if parametrize.is_parametrized(module):
        return "it is parametrized, which replaced its class; swap before register_parametrization"
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        of = type(tensor)
        if is_traceable_wrapper_subclass(cast(object, tensor)):  # to mypy no tensor is one
            return f"{name} is a {of.__name__}; swap before sharding or quantizing"
        if verify and tensor.is_meta:
            return f"{name} is on the meta device, where nothing can be verified; load it first, or pass verify=False"
    derived = itertools.takewhile(lambda kind: kind is not upstream, type(module).__mro__)
    for kind in derived:
        for name in _public_and_private(kind):
            if any(name in vars(base) for base in upstream.__mro__ if base not in (nn.Module, object)):
                return f"{kind.__name__} overrides {name} of {upstream.__name__}, which the fused form would ignore"
    return None


def _unfit(compat: type[Compat], module: nn.Module) -> str | None:
    """Why a module is not what a fused form replaces: its methods, its structure, the layout of its class."""
    kind = type(module)
    hidden = [name for name in _public_and_private(Compat) if hasattr(kind, name)]
    if hidden:
        return f"its {hidden[0]} would be hidden"
    try:
        if why := compat.refusal(module):
            return why
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"its structure is another ({error})"
    theirs, ours = _arguments(kind), _arguments(compat)
    if ours[: len(theirs)] != theirs:
        return f"forward takes {', '.join(theirs)}; that of the fused form {', '.join(ours)}"
    try:
        object.__setattr__(kind.__new__(kind), "__class__", fused_class(compat, kind))
    except TypeError as error:
        return f"its class cannot be replaced ({error})"
    return None


def _arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of the arguments of forward, without those that take any."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _public_and_private(kind: type) -> list[str]:
    return [name for name in vars(kind) if not (name.startswith("__") and name.endswith("__"))]


def _looks_like_a_bottleneck(kind: type) -> bool:
    return bool(LIKE_A_BOTTLENECK.search(kind.__name__)) and not kind.__module__.startswith("torch.")


def _classes_of(module: Compat) -> tuple[str, str]:
    """The upstream class and the fused one, of a swapped module or of one that was made as a fused one."""
    if isinstance(module, InPlace):
        return _qualified(module._lamkernels_upstream), _qualified(module._lamkernels_compat)
    return _qualified(type(module)), _qualified(type(module))


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _contains(name: str, other: str) -> bool:
    return name != other and (not name or other.startswith(f"{name}."))
