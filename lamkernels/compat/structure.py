"""Is a module built like the upstream class of its name?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn


def difference(
    module: nn.Module,
    *,
    attributes: Mapping[str, type | tuple[type, ...]],
    children: Collection[str],
    tensors: Mapping[str, tuple[int | str, ...]],
) -> str | None:
    """The first difference between a module and a description of its class, in words; None without one.

    Args:
        module: it is looked at, and nothing is run.
        attributes: the type of each attribute that the class relies on.
        children: the names of its submodules, all of them.
        tensors: the shapes of its own parameters and buffers, all of them; an entry is a size, or the name of the
            attribute that holds it.
    """
    for name, kind in attributes.items():
        value = getattr(module, name, None)
        if not isinstance(value, kind):
            return f"its {name} is {_described(value)}; expected is {_names(kind)}"
    found = {name for name, _ in module.named_children()}
    if found != set(children):
        return f"its submodules are {_listed(found)}; expected are {_listed(children)}"
    own: dict[str, Tensor] = {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }
    if own.keys() != tensors.keys():
        return f"its parameters and buffers are {_listed(own)}; expected are {_listed(tensors)}"
    for name, sizes in tensors.items():
        shape = tuple(getattr(module, size) if isinstance(size, str) else size for size in sizes)
        if own[name].shape != shape:
            return f"its {name} has shape {tuple(own[name].shape)}; expected is {shape}"
    return None


def beyond_lookup(table: nn.Embedding) -> str | None:
    """What a table does beside looking up, which a fused lookup would pass by, in words; None without any."""
    if table.padding_idx is not None or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return "has padding_idx, max_norm, scale_grad_by_freq or sparse set"
    if table._forward_hooks or table._forward_pre_hooks or table._backward_hooks or table._backward_pre_hooks:
        return "has forward hooks or backward hooks"
    return None


def _described(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _names(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"
