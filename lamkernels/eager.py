"""When a kernel may be called without the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def in_shape(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that nobody else holds, in another shape.

    Not as a view, which ``reshape`` makes: FSDP2 warns of views that a module returns, and autograd follows what is
    written into one to what it is a view of.
    """
    if not fresh.is_contiguous():
        return fresh.reshape(shape)
    reshaped: Tensor = torch.ops.aten._unsafe_view(fresh, shape)
    return reshaped


def routed(quantized: Tensor, x: Tensor) -> Tensor:
    """A straight-through result, which autograd knows only where it knows x: a learned codebook gets nothing by it."""
    return quantized if x.requires_grad else quantized.detach()


# Asked for before every small call, so looked up once.
_compiling = torch.compiler.is_compiling
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _tracing = torch._C._functorch.maybe_current_level, torch._C._get_tracing_state


def is_plain(*tensors: Any, device: str = "cpu") -> bool:
    """Whether these are ordinary CPU tensors and nothing watches or transforms the operators that they go through.

    Then an autograd function over a kernel does what the registered operator does, in half the time. Not so in compiled
    or traced code, under a mode (a default device is one), a function transform or forward-mode differentiation, and
    for tensors whose values are not what lies in their memory. With ``device="cuda"``, the same of tensors on GPUs.
    """
    if _compiling():  # first: what follows is not for the compiler to read
        return False
    if _modes() or _function_modes() or forward_ad._current_level >= 0:
        return False
    if _transform() is not None or _tracing() is not None:
        return False
    on_cpu = device == "cpu"
    try:
        for tensor in tensors:
            kind = type(tensor)
            if kind is not Tensor and kind is not Parameter:
                return False
            if not (tensor.is_cpu if on_cpu else tensor.is_cuda) or tensor.is_neg() or tensor.is_nested:
                return False
            if not tensor.data_ptr():  # nothing in it, or zeros that are not there
                return False
    except RuntimeError:  # no memory of its own: sparse, or wrapped by a transform, also one that outlived it
        return False
    return True


def is_ordinary(*grads: Tensor | None, device: str = "cpu") -> bool:
    """Not where the operator is needed: it refuses second derivatives, and has a batching rule."""
    return not torch.is_grad_enabled() and is_plain(*[grad for grad in grads if grad is not None], device=device)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` without its search for function transforms, of which there are none here: see `is_plain`."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
