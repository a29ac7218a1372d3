"""What :class:`lamkernels.Covariance` stands on: a stream cut into fixed blocks, and moments that can be merged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Columns = dict[str, Tensor]  # tensors of equally many rows, by name
Totals = dict[str, Tensor]  # count () int64; weight (), mean_x, xx and, of two sides, mean_y, xy, yy: fp64

P = ParamSpec("P")
R = TypeVar("R")

STRIP = 128  # rows of a scatter that are merged at once: the temporary stays in the cache
FILL = {"weights": 1.0, "starts": False}  # what a row holds in a column that it came without


def writable(method: Callable[P, R]) -> Callable[P, R]:
    """Returns the method without gradients and inference mode: tensors made in that mode could not be written later."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return wrapped


class RowBuffer:
    """Cuts a stream of rows into blocks that do not depend on how the stream arrives.

    Block b holds the rows from b·rows to (b + 1)·rows + overlap, so that consecutive blocks share ``overlap`` rows.
    Blocks that lie within one batch are views of it; only the rows of the last, unfinished block are copied.

    Args:
        rows: new rows per block.
        overlap: rows that a block shares with the next one.
    """

    def __init__(self, rows: int, overlap: int) -> None:
        self.rows, self.overlap, self.filled = rows, overlap, 0
        self._columns: Columns = {}

    def push(self, batch: Columns) -> Iterator[Columns]:
        """Takes the rows of ``batch`` in and yields every block that they complete, in order.

        Args:
            batch: "x" (N, D), and any other column with N rows. A column of ``FILL`` may come and go.

        Yields:
            The columns of a block, contiguous, (rows + overlap, ...); valid until the next one is asked for.
        """
        size, taken, total = self.rows + self.overlap, 0, len(batch["x"])
        while self.filled + total - taken >= size:
            if self.filled == 0:  # contiguous as the buffer is: a library's product may round by the layout
                yield {name: column[taken : taken + size].contiguous() for name, column in batch.items()}
                taken += self.rows
                continue
            room = size - self.filled
            self._append(batch, taken, taken + room)
            taken += room
            yield self.pending()
            self.keep(self.overlap)
            if taken >= self.overlap:  # what is left in the buffer is in the batch as well
                taken, self.filled = taken - self.overlap, 0
        self._append(batch, taken, total)

    def pending(self) -> Columns:
        """The rows that wait for their block to be full; views."""
        return {name: column[: self.filled] for name, column in self._columns.items()}

    def keep(self, rows: int) -> None:
        """Forgets all but the last ``rows`` rows."""
        kept = min(rows, self.filled)
        for column in self._columns.values():
            column[:kept] = column[self.filled - kept : self.filled].clone()  # the two may overlap
        self.filled = kept

    def replace(self, columns: Columns, device: torch.device) -> None:
        """Holds copies of these columns on ``device`` and nothing else; none of them may be longer than a block."""
        self._columns, self.filled = {}, 0
        if columns:
            self._append({name: column.to(device) for name, column in columns.items()}, 0, len(columns["x"]))

    def _append(self, batch: Columns, start: int, stop: int) -> None:
        if start == stop:
            return
        if self.filled == 0:  # the columns, their dtypes and their device are those of the new rows
            for name in self._columns.keys() - batch.keys():
                del self._columns[name]
        for name in {**batch, **self._columns}:
            if name not in self._columns:
                like = batch[name]
                column = like.new_empty((self.rows + self.overlap, *like.shape[1:]))
                column[: self.filled] = FILL.get(name, 0)
                self._columns[name] = column
            into = self._columns[name][self.filled : self.filled + stop - start]
            if name in batch:
                into.copy_(batch[name][start:stop])
            else:
                into.fill_(FILL[name])
        self.filled += stop - start


def empty_totals(dim: int, dim_y: int | None, device: torch.device) -> Totals:
    """The moments of nothing, with room for rows of ``dim`` and, unless None, of ``dim_y`` entries."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (), "mean_x": (dim,), "xx": (dim, dim)}
    if dim_y is not None:
        shapes |= {"mean_y": (dim_y,), "xy": (dim, dim_y), "yy": (dim_y, dim_y)}
    totals = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
    return {"count": torch.zeros((), dtype=torch.int64, device=device), **totals}


def merge_(total: Totals, part: Totals) -> None:
    """Adds the moments of other rows to ``total``, in place (Chan, Golub & LeVeque 1983).

    With weights a and b and means p and q, the scatter of both is S_a + S_b + ab/(a + b)·(q − p)(q − p)ᵀ. Merging with
    nothing, on either side, changes no bit.
    """
    weight = total["weight"] + part["weight"]
    share = torch.where(weight > 0, part["weight"] / weight, 0.0)
    root = (total["weight"] * share).sqrt()
    steps = {}
    for side in ("x", "y") if "yy" in total else ("x",):
        step = part[f"mean_{side}"] - total[f"mean_{side}"]
        total[f"mean_{side}"].add_(step * share)
        steps[side] = root * step
    for scatter in ("xx", "xy", "yy") if "yy" in total else ("xx",):
        left, right = steps[scatter[0]], steps[scatter[1]]
        strips = (torch.split(tensor, STRIP) for tensor in (total[scatter], part[scatter], left))
        for into, added, rows in zip(*strips, strict=True):
            # a product that is rounded before it is added keeps xx symmetric to the last bit; addr_ fuses some entries
            into.add_(torch.outer(rows, right).add_(added))
    total["weight"].copy_(weight)
    total["count"].add_(part["count"])


def pack(totals: Totals) -> Tensor:
    """All of ``totals`` as one fp64 vector; counts below 2⁵³ are exact."""
    return torch.cat([tensor.double().flatten() for tensor in totals.values()])


def unpack(packet: Tensor, like: Totals) -> Totals:
    """The inverse of :func:`pack`: views of ``packet`` in the shapes of ``like``."""
    parts = torch.split(packet, [tensor.numel() for tensor in like.values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype) for (name, tensor), part in zip(like.items(), parts, strict=True)
    }
