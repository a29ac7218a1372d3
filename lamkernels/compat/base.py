"""What the drop-in forms of upstream modules have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Compat(nn.Module):
    """The fused form of an upstream module, under the upstream constructor, attributes and state_dict keys.

    Such a class serves twice. A user imports it instead of upstream's. And :func:`lamkernels.compat.swap` makes a
    subclass of it and of upstream's class, and gives that to a module that exists already: no constructor runs then, so
    the methods may rely on attributes that upstream's constructor sets, and on nothing else.
    """

    upstream_names: ClassVar[tuple[str, ...]] = ()  # the names upstream, and its copies, give to the class

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module of an upstream name is not what this class replaces, in words; None where it is.

        Looks at its attributes, their types and shapes, and at the options that are not supported; runs nothing.
        """
        raise NotImplementedError

    def probe(self) -> tuple[Any, ...]:
        """Arguments of a small forward, on the device and in the dtype of the parameters, to compare both forms on."""
        raise NotImplementedError
