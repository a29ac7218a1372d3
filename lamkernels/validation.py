"""Checks of the arguments of public functions: each raises one line that says what was wrong and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Metric = Literal["l2", "cosine", "dot"]
Precision = Literal["default", "exact", "fast"]
Gradient = Literal["ste", "rotation", "noise", "none"]
Backend = Literal["auto", "reference", "numba", "triton", "cuda"]
METRICS, PRECISIONS, GRADIENTS, BACKENDS = (get_args(option) for option in (Metric, Precision, Gradient, Backend))

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    """The value is one of the allowed ones, else ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def check_integer(name: str, value: int) -> None:
    """An int (or a symbolic one, in compiled code) of at least 1, else TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}; it must be an int")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def check_number(name: str, value: float, valid: Callable[[float], bool], rule: str) -> None:
    """A real number that is valid, else TypeError or ValueError with the rule."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not valid(value):
        raise ValueError(f"{name} is {value}; it must be {rule}")


def check_weight(name: str, value: float) -> None:
    """A finite number of at least 0, else TypeError or ValueError."""
    check_number(name, value, lambda value: 0 <= value < math.inf, "at least 0 and finite")


def check_float(name: str, tensor: Tensor) -> None:
    """A tensor (..., D) of a supported floating dtype, else TypeError or ValueError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; it must be float32, float16, bfloat16 or float64")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; it must be dense (torch.strided)")
    if tensor.ndim == 0:
        raise ValueError(f"{name} is a scalar; it must have an axis of vectors, (..., D)")


def check_indices(indices: Tensor) -> None:
    """An int64 tensor, else TypeError."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices is a {type(indices).__name__}; it must be a torch.Tensor")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices is {indices.dtype}; it must be int64")


def check_codebook(codebook: Tensor) -> None:
    """(K, D) or (H, K, D), neither K nor D zero, else ValueError."""
    if codebook.ndim not in (2, 3) or codebook.numel() == 0:
        raise ValueError(
            f"codebook has shape {tuple(codebook.shape)}; it must be (K, D) or (H, K, D) with H, K and D at least 1"
        )


def check_mask(mask: Tensor, x: Tensor) -> None:
    """A bool tensor of the leading shape and on the device of x, else TypeError or ValueError."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}; it must be a torch.Tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; it must be bool")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; for x of {tuple(x.shape)} it must be {tuple(x.shape[:-1])}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device} and x on {x.device}; they must be on one device")


def check_tensors(x: Tensor, codebook: Tensor) -> None:
    """x and codebook fit each other in shape, dtype and device, else TypeError or ValueError."""
    check_float("x", x)
    check_float("codebook", codebook)
    check_codebook(codebook)
    if x.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"x has rows of {x.shape[-1]} and codebook of {codebook.shape[-1]} entries; they must be equal"
        )
    if codebook.ndim == 3 and (x.ndim < 2 or x.shape[0] != codebook.shape[0]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; with a codebook per head, {tuple(codebook.shape)}, it must be "
            f"({codebook.shape[0]}, ..., {codebook.shape[-1]})"
        )
    half = x.dtype in (torch.float16, torch.bfloat16)
    if codebook.dtype != x.dtype and not (half and codebook.dtype == torch.float32):
        raise TypeError(
            f"codebook is {codebook.dtype} and x is {x.dtype}; codebook must have the dtype of x, or be float32 with "
            "float16 or bfloat16 x"
        )
    if x.device != codebook.device:
        raise ValueError(f"x is on {x.device} and codebook on {codebook.device}; they must be on one device")


def check_levels(levels: Sequence[int]) -> list[int]:
    """At least one count, each from 2 to 65536, with a product that int64 can index, else TypeError or ValueError."""
    counts = list(levels)
    if not all(isinstance(count, int) for count in counts):
        raise TypeError(f"levels is {levels!r}; it must be a sequence of integers")
    if not counts or min(counts) < 2 or max(counts) > 2**16 or math.prod(counts) >= 2**63:
        raise ValueError(
            f"levels is {counts}; there must be at least one, each in [2, 65536], with a product below 2**63"
        )
    return counts


def check_positive(name: str, value: float) -> None:
    """A positive and finite number, else TypeError or ValueError."""
    check_number(name, value, lambda value: 0 < value < math.inf, "positive and finite")


def refuse_tangents(*tensors: Tensor) -> None:
    """Operators without a forward-mode rule would return a tangent of zero without a word."""
    unpack: Any = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and any(unpack(t).tangent is not None for t in tensors):
        raise NotImplementedError("forward-mode differentiation (jvp, jacfwd) is not supported; use reverse mode")
