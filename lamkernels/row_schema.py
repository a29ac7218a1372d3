"""What the rows of a :class:`lamkernels.Covariance` look like: their blocks, their sides, and the checks of both."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lamkernels.accumulate import Columns
from lamkernels.validation import FLOATS, check_float, check_integer


class RowSchema:
    """The sizes of rows, the names of their blocks, and the side ("x" or "y") that a name stands for.

    Args:
        dim: D, or the sizes of named blocks in their order.
        dim_y: E or None.
        lag: h or None.

    Raises:
        TypeError: a size or the lag is no int.
        ValueError: one is below 1, or they do not go together.
    """

    def __init__(self, dim: int | Mapping[str, int], dim_y: int | None, lag: int | None) -> None:
        self.named = isinstance(dim, Mapping)
        self.blocks: dict[str, int] = dict(dim) if isinstance(dim, Mapping) else {"x": dim}
        if not self.blocks:
            raise ValueError("dim is an empty mapping; it must have at least one block")
        for name, size in self.blocks.items():
            check_integer(f"dim[{name!r}]" if self.named else "dim", size)
        for name, value in (("dim_y", dim_y), ("lag", lag)):
            if value is not None:
                check_integer(name, value)
        if dim_y is not None and (self.named or lag is not None):
            reason = "named blocks (name the second rows)" if self.named else f"lag={lag} (the later row is the second)"
            raise ValueError(f"dim_y is {dim_y}; it must be None with {reason}")
        self.dim, self.dim_y, self.lag = sum(self.blocks.values()), dim_y, lag
        self.second_dim = dim_y if lag is None else self.dim  # of the rows on the side "y", if there is one
        self.places = self._name_places() if self.named else {}

    def _name_places(self) -> dict[str, tuple[str, slice]]:
        stops = itertools.accumulate(self.blocks.values())
        ends = zip(self.blocks.items(), stops, strict=True)
        columns = {name: slice(stop - size, stop) for (name, size), stop in ends}
        places = {name: ("x", part) for name, part in columns.items()}
        if self.lag is not None:
            for name, part in columns.items():
                if f"{name}_next" in places:
                    raise ValueError(
                        f"dim has {name!r} and '{name}_next'; with a lag that is the name of the later {name!r}"
                    )
                places[f"{name}_next"] = ("y", part)
        return places

    def place(self, argument: str, name: str) -> tuple[str, slice]:
        """The side and the columns of a named block; ``argument`` says in the ValueError what the name was given as."""
        if name not in self.places:
            known = ", ".join(map(repr, self.places)) or "none, because dim is no mapping"
            raise ValueError(f"{argument} is {name!r}; the named blocks are {known}")
        return self.places[name]

    def config(self) -> dict[str, object]:
        """What two accumulators must agree on, in the types of JSON."""
        dim = [list(block) for block in self.blocks.items()] if self.named else self.dim
        return {"dim": dim, "dim_y": self.dim_y, "lag": self.lag}

    @property
    def units(self) -> str:
        """What is counted."""
        return "rows" if self.lag is None else "pairs"

    def __repr__(self) -> str:
        options = [f"{name}={value}" for name, value in (("dim_y", self.dim_y), ("lag", self.lag)) if value is not None]
        return ", ".join([repr(self.blocks if self.named else self.dim), *options])

    def pending_like(self, pending: Columns) -> Columns:
        """The columns that the pending rows of a state must have, with the optional ones of ``pending``; on "meta"."""
        if not pending:
            return {}
        count = len(pending["x"]) if "x" in pending else 0
        dtype = pending["x"].dtype if "x" in pending and pending["x"].dtype in FLOATS else torch.float32
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"x": (dtype, (count, self.dim))}
        if self.dim_y is not None:
            shapes["y"] = (dtype, (count, self.dim_y))
        optional = {"weights": (torch.float64, (count,)), "starts": (torch.bool, (count,))}
        shapes |= {name: value for name, value in optional.items() if name in pending}
        return {name: torch.empty(shape, dtype=kind, device="meta") for name, (kind, shape) in shapes.items()}

    def check(self, x: object, y: object, dtype: torch.dtype | None, device: torch.device | None) -> Columns:
        """The tensors of an update by name: the blocks, or "x" and, with a ``dim_y``, "y".

        Args:
            x: what the user gave: a tensor, or a mapping of tensors.
            y: what the user gave: a tensor or None.
            dtype: of the rows so far; None if there were none.
            device: of the rows so far; None if there were none.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: wrong shapes, names or devices.
        """
        if isinstance(x, Mapping) != self.named:
            wanted = f"a mapping of tensors: {', '.join(self.blocks)}" if self.named else "a torch.Tensor"
            raise TypeError(f"x is a {type(x).__name__}; it must be {wanted}")
        if (y is None) != (self.dim_y is None):
            raise ValueError(f"y is {'missing' if y is None else 'given'}, but dim_y is {self.dim_y}")
        given: list[tuple[str, str, Any, int | None]]  # key, name in messages, tensor, entries of a row
        if isinstance(x, Mapping):
            if x.keys() != self.blocks.keys():
                raise ValueError(f"x has the blocks {list(x)}; they must be {list(self.blocks)}")
            given = [(name, f"x[{name!r}]", x[name], size) for name, size in self.blocks.items()]
        else:
            given = [("x", "x", x, self.dim)] + ([] if y is None else [("y", "y", y, self.dim_y)])
        count: int | str = "N"
        for _, name, tensor, size in given:
            check_float(name, tensor)
            if tensor.ndim != 2 or tensor.shape[1] != size or count not in ("N", len(tensor)):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({count}, {size})")
            count, dtype, device = len(tensor), dtype or tensor.dtype, device or tensor.device
            if tensor.dtype != dtype:
                raise TypeError(f"{name} is {tensor.dtype}; it must be {dtype}, as the other rows")
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, as the accumulator")
        return {key: tensor for key, _, tensor, _ in given}

    def joined(self, rows: Columns, extras: Columns, at_most: int) -> Iterator[Columns]:
        """The columns of a batch: ``rows`` and ``extras``; named blocks are joined, ``at_most`` so many rows at a time.

        Yields:
            "x", perhaps "y", and the extras.
        """
        if not self.named:
            yield rows | extras
            return
        for start in range(0, len(next(iter(rows.values()))), at_most):
            part = slice(start, start + at_most)
            joint = torch.cat([tensor[part] for tensor in rows.values()], dim=1)
            yield {"x": joint, **{name: column[part] for name, column in extras.items()}}


def check_extras(weights: object, starts: object, lag: int | None, like: Tensor) -> Columns:
    """The columns that go with N rows: "weights" (N,) fp64 and "starts" (N,) bool, those that are given.

    Raises:
        TypeError: one is no tensor, weights is complex, or starts is not bool.
        ValueError: a shape, a device or a weight does not fit, or starts is given without a lag.
    """
    extras: Columns = {}
    for name, column in (("weights", weights), ("starts", starts)):
        if column is None:
            continue
        if not isinstance(column, Tensor):
            raise TypeError(f"{name} is a {type(column).__name__}; it must be a torch.Tensor")
        if column.shape != like.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(column.shape)}; it must be ({len(like)},)")
        if column.device != like.device:
            raise ValueError(f"{name} is on {column.device}; it must be on {like.device}, as x")
        extras[name] = column
    if "weights" in extras:
        if extras["weights"].is_complex():
            raise TypeError(f"weights is {extras['weights'].dtype}; it must be real numbers or bool")
        extras["weights"] = extras["weights"].double()
        if not ((extras["weights"] >= 0) & extras["weights"].isfinite()).all():
            raise ValueError("weights has entries that are negative or not finite; they must be finite and at least 0")
    if "starts" in extras:
        if lag is None:
            raise ValueError("starts is given, but lag is None; episodes matter only to pairs, with a lag of 1 or more")
        if extras["starts"].dtype != torch.bool:
            raise TypeError(f"starts is {extras['starts'].dtype}; it must be bool")
    return extras


def layout(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The dtype and the shape of each tensor, in words."""
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in state.items()}


def check_equal(name: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Two mappings are equal, else ValueError with the keys that differ."""
    keys = [key for key in {**wanted, **found} if found.get(key, "missing") != wanted.get(key, "absent")]
    if keys:
        differences = (f"{key} is {found.get(key, 'missing')}, not {wanted.get(key, 'absent')}" for key in keys)
        raise ValueError(f"{name} does not fit: {'; '.join(differences)}")
