"""The class that a module gets when it becomes a fused one where it is."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Hashable
from typing import Any, ClassVar, cast

from torch import nn

from lamkernels.compat.base import Compat


class InPlace(nn.Module):
    """First base of the classes that :func:`fused_class` makes: they copy as they are, and pickle as upstream's."""

    # long names: they come before those of upstream and of the compat class
    _lamkernels_upstream: ClassVar[type[nn.Module]]
    _lamkernels_compat: ClassVar[type[Compat]]

    def _get_name(self) -> str:
        return f"{type(self).__name__} (fused)"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state

    def __copy__(self) -> nn.Module:
        return _filled(type(self).__new__(type(self)), InPlace.__getstate__(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        inherited = getattr(self._lamkernels_upstream, "__deepcopy__", None)
        if inherited is not None:
            copied: nn.Module = inherited(self, memo)
            copied.__class__ = type(self)
            return copied
        memo[id(self)] = copied = type(self).__new__(type(self))  # before its state, which may refer to the module
        return _filled(copied, copy.deepcopy(InPlace.__getstate__(self), memo))

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """A pickle names upstream's class, so that it opens where lamkernels is not installed."""
        # as protocol 1 does: the later ones write a call of __new__, which must name the class of the instance
        reduced = super().__reduce_ex__(1)
        if isinstance(reduced, str):
            return reduced
        rebuild, arguments, *rest = reduced
        made = fused_class(self._lamkernels_compat, self._lamkernels_upstream)
        return (rebuild, tuple(self._lamkernels_upstream if a is made else a for a in arguments), *rest)


def _filled(module: nn.Module, state: dict[str, Any]) -> nn.Module:
    module.__setstate__(state)  # type: ignore[no-untyped-call]
    return module


def fused_class(compat: type[Compat], upstream: type[nn.Module]) -> type[nn.Module]:
    """The subclass of both whose methods are those of ``compat``, under the name of ``upstream``: one for each pair.

    Raises:
        TypeError: Python does not allow a class of these bases.
    """
    return _made(cast(Hashable, compat), cast(Hashable, upstream))  # mypy takes the hash of the instances for theirs


@functools.cache
def _made(compat: Any, upstream: Any) -> type[nn.Module]:
    attributes = {
        "__module__": upstream.__module__,
        "__qualname__": upstream.__qualname__,
        "__doc__": compat.__doc__,
        "_lamkernels_upstream": upstream,
        "_lamkernels_compat": compat,
    }
    made = types.new_class(
        upstream.__name__, (InPlace, compat, upstream), exec_body=lambda space: space.update(attributes)
    )
    assert issubclass(made, nn.Module)
    return made


def restore(modules: list[tuple[str, nn.Module]]) -> tuple[str, ...]:
    """Gives those of the named modules that are swapped their classes back, and returns their names.

    Raises:
        ValueError: one of them got another class since; nothing is changed.
    """
    swapped = [(name, module) for name, module in modules if isinstance(module, InPlace)]
    for name, module in swapped:
        if type(module) is not fused_class(module._lamkernels_compat, module._lamkernels_upstream):
            kind = type(module).__name__
            raise ValueError(f"{name or 'the model'} became a {kind} after the swap; undo that before unswap")
    for _, module in swapped:
        object.__setattr__(module, "__class__", module._lamkernels_upstream)
    return tuple(name for name, _ in swapped)
