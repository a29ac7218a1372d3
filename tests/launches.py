"""What a call on tensors without values would run on a GPU: kernels of Triton, and operators of torch that do work."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from lamkernels.bench.ahead import record
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like", "detach", "_unsafe_view")


class _Operators(TorchDispatchMode):
    """Runs the operators of lamkernels in Triton, and notes those of torch that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = operator._schema.name.split("::")
        if space == "lamkernels":
            folder = name.removesuffix("_backward")
            kernel = getattr(importlib.import_module(f"lamkernels.ops.{folder}.triton"), name)
            with self:
                return kernel(*args[:-1])
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in operator._schema.arguments)
        if not view and name not in ALLOCATIONS:
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


def launches(call: Callable[[], object], target: str = "sm_90") -> tuple[list[str], list[str]]:
    """The Triton kernels and the torch operators of ``call``, by name; one operator can be several kernels."""
    with _Operators() as operators:
        kernels = [launch.kernel.__name__ for launch in record(target, call)]
    return kernels, operators.names


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")
