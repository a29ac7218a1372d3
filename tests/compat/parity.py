"""What the tests of the drop-in forms share: twins of one seed, and a step that may not wait for a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# what a GPU would be waited for: a number, or a size, that the host has to know
SYNCS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item", "equal.default", "is_nonzero")


def twins(stock: Callable[..., Any], ours: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Any]:
    """Both forms, made with one seed."""
    torch.manual_seed(7)
    first = stock(*args, **options)
    torch.manual_seed(7)
    return first, ours(*args, **options)


def both(modules: tuple[Any, Any], call: Callable[[Any], Any], seed: int = 11) -> list[Any]:
    """``call`` of each module, from one seed; after it both have drawn as much."""
    results, following = [], []
    for module in modules:
        torch.manual_seed(seed)
        results.append(call(module))
        following.append(torch.rand(()))
    assert torch.equal(*following), "one form draws more random numbers than the other"
    return results


class Syncs(TorchDispatchMode):
    """Records the operators that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        boolean_index = "index" in str(func) and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for a in args
            if isinstance(a, (list, tuple))
            for i in a
        )
        if boolean_index or any(name in str(func) for name in SYNCS):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def copied(output: Any) -> Any:
    """Tensors detached, numpy arrays copied: what a later step does not change."""
    return torch.as_tensor(output).detach().clone()
