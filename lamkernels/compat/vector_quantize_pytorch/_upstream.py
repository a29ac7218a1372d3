"""What is not fused runs in the installed vector-quantize-pytorch, on the same parameters and buffers."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import nn

from lamkernels.compat.base import Compat

PACKAGE = "vector_quantize_pytorch"
INSTALL = "pip install vector-quantize-pytorch==1.32.0"


class Delegating(Compat):
    """A module in the state of its upstream class, whose methods can run on that state.

    A constructor that is given an option without a fused form takes over the attributes of an upstream module made with
    the same arguments. The class stays this one, so that isinstance, subclasses, pickles and state_dicts behave, and a
    forward that finds such an option among the attributes calls upstream's.
    """

    upstream_module: ClassVar[str]  # the file of the package that defines the class

    def _take_over(self, options: dict[str, Any], unfused: list[str]) -> None:
        """Becomes what the upstream constructor makes of ``options``, of which those named are not fused."""
        made = self._upstream_class(", ".join(f"{name}={options[name]!r}" for name in unfused))(**options)
        object.__setattr__(self, "__dict__", made.__dict__)

    def _upstream(self, why: str) -> Any:
        """This module as one of upstream's class: the same attributes, not a copy of them."""
        cls = self._upstream_class(why)
        module = cls.__new__(cls)
        object.__setattr__(module, "__dict__", self.__dict__)
        return module

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_upstream(self, why: str, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._upstream(why), method)(*args, **kwargs)

    def _upstream_class(self, why: str) -> Any:
        name = type(self).upstream_names[0]
        for cls in type(self).__mro__:  # a swapped module is of a subclass of both
            if cls.__name__ == name and not issubclass(cls, Compat):
                return cls
        return getattr(load(f"{name}({why})", type(self).upstream_module), name)


def load(what: str, module: str) -> Any:
    """A module of the installed package, else an ImportError that says what needs it."""
    try:
        return importlib.import_module(f"{PACKAGE}.{module}")
    except ImportError as error:
        raise ImportError(
            f"{what} has no fused form; it runs in vector-quantize-pytorch, which does not import here ({error}): "
            f"{INSTALL}"
        ) from error


def upstream_name(package: str, name: str) -> Any:
    """An attribute of the installed package, for a name that ``package`` does not have."""
    try:
        return getattr(importlib.import_module(PACKAGE), name)
    except (ImportError, AttributeError) as error:
        raise AttributeError(
            f"module {package!r} has no attribute {name!r}, and the installed vector-quantize-pytorch gives none "
            f"({error}): {INSTALL}"
        ) from error


def missing_attributes(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why a module is not of the version that the fused form knows, by the attributes it lacks."""
    absent = [name for name in names if not hasattr(module, name)]
    return f"it has no attribute {', '.join(absent)}, as VQP 1.32.0 has" if absent else None
