"""Means and covariances of a stream of rows, exact, in one pass, whatever its length."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lamkernels.accumulate import Columns, RowBuffer, Totals, empty_totals, merge_, pack, unpack, writable
from lamkernels.backend import resolve
from lamkernels.joint_moments import PRECISIONS, MomentsPrecision, moments
from lamkernels.row_schema import RowSchema, check_equal, check_extras, layout
from lamkernels.validation import BACKENDS, Backend, check_number, check_option

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FORMAT = 1  # of the state; changes with the blocks as well, because a resumed stream must keep its bits
BLOCK_ENTRIES, LEAST_ROWS = 2**22, 8192  # 16 MiB of fp32; enough rows to make the merge of a D×D scatter cheap


def block_rows(dim: int) -> int:
    """Returns how many rows of ``dim`` entries make a block: a power of two."""
    return max(LEAST_ROWS, 1 << (BLOCK_ENTRIES // dim).bit_length() >> 1)


class Covariance:
    """The mean and the covariance of a stream of rows, of two streams, or of a stream and its own future.

    Rows are gathered into blocks of a size that depends on the dimensions only; each block is centred and multiplied by
    :func:`lamkernels.moments`, and merged in fp64 (Chan, Golub & LeVeque 1983). So a stream that arrives in
    other batches gives the same bits, a large mean costs no accuracy, and memory is O(D² + block·D). Reading a result
    changes nothing. A row (with y or a lag: a pair) that is not finite is left out, and so is one of weight 0.

    With a ``lag`` of h the pairs are (x_t, x_{t+h}), within an episode. x is then the earlier and y the later row of a
    pair, each with its own mean: ``covariance()`` is C₀₀, ``cross_covariance()`` C₀ₕ (rows: earlier, columns: later),
    ``covariance_y()`` Cₕₕ.

    Args:
        dim: D, the entries of a row; or the sizes of named blocks, ``{"o": 64, "a": 6}``, whose rows come as a mapping
            of tensors and are joined in this order. With a lag h, ``"o_next"`` names block "o" of the later row.
        dim_y: E, the entries of a second row that comes with each row of x; not with named blocks or a lag.
        lag: h ≥ 1, the distance of the rows of a pair, in rows.
        precision: "default", or "exact" for fp64 products within a block (:func:`lamkernels.moments`).
        device: of the state; None means that of the first rows. With several processes on GPUs, name it: a process
            may get no rows.
        backend: "auto", "reference", "numba", "triton" or "cuda". An explicit one never falls back.

    Raises:
        TypeError: dim, dim_y or lag is not an int (dim: or a mapping of them).
        ValueError: one of them is below 1, they do not go together, or an option is unknown.

    Example:
        >>> cov = Covariance({"o": 64, "a": 6}, lag=1)
        >>> for rows, actions, starts in episodes:
        ...     cov.update({"o": rows, "a": actions}, starts=starts)
        >>> cov.covariance("o_next", "o")  # Σ_o'o, (64, 64) fp64
    """

    def __init__(
        self,
        dim: int | Mapping[str, int],
        dim_y: int | None = None,
        *,
        lag: int | None = None,
        precision: MomentsPrecision = "default",
        device: torch.device | str | None = None,
        backend: Backend = "auto",
    ) -> None:
        self._schema = RowSchema(dim, dim_y, lag)
        check_option("precision", precision, PRECISIONS)
        check_option("backend", backend, BACKENDS)
        self.precision, self.backend = precision, backend
        self._overlap = lag or 0
        self._asked_device = None if device is None else torch.empty(0, device=device).device  # "cuda" with its index
        self._rows = RowBuffer(block_rows(self._schema.dim + (dim_y or 0)), self._overlap)
        self.reset()

    @writable
    def reset(self) -> Covariance:
        """Forgets all rows, and returns the accumulator."""
        self._device = self._asked_device or torch.device("cpu")
        self._pinned = self._asked_device is not None  # else the first rows choose the device
        self._dtype: torch.dtype | None = None
        self._own = self._empty()  # the rows of this process,
        self._common: Totals = {}  # and those of all processes, once all_reduce has been called
        self._rows.replace({}, self._device)
        self._read: Totals | None = None  # what results are read from, until something changes
        return self

    @writable
    def update(
        self,
        x: Tensor | Mapping[str, Tensor],
        y: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Covariance:
        """Takes rows in. With a lag they continue the rows of the last update, unless ``starts`` says otherwise.

        Args:
            x: (N, D) float32, float16, bfloat16 or float64, the same for all updates; with named blocks a mapping of
                (N, d) tensors. Any strides; no gradient.
            y: (N, E) in the dtype of x, where the accumulator has a ``dim_y``.
            weights: (N,) numbers or bool, finite and not negative; None means 1. With a lag the weight of a pair is
                that of its earlier row.
            starts: (N,) bool, with a lag only: the row is the first of an episode. No pair crosses such a row.

        Returns:
            The accumulator.

        Raises:
            TypeError: a tensor has a wrong type or dtype.
            ValueError: a shape, a name, a device or a weight does not fit. Nothing has been taken in.
            RuntimeError: the backend asked for cannot run here.
        """
        rows = self._schema.check(x, y, self._dtype, self._device if self._pinned else None)
        first = next(iter(rows.values()))
        extras = check_extras(weights, starts, self._schema.lag, first)
        resolve(self.backend, first.device.type)
        if len(first) == 0:
            return self
        if not self._pinned:
            self._move(first.device)
        self._dtype, self._pinned, self._read = first.dtype, True, None
        for batch in self._schema.joined(rows, extras, self._rows.rows):
            for block in self._rows.push(batch):
                merge_(self._own, self._moments(block))
        return self

    @writable
    def merge(self, other: Covariance) -> Covariance:
        """Adds the rows of ``other``, which stays as it is; the result agrees with one accumulator's to rounding.

        No pair is made between the two: with a lag, cut a stream at the start of an episode. The sequence of this
        accumulator goes on with its next update.

        Raises:
            TypeError: other is no Covariance.
            ValueError: the dimensions, blocks, lag or precision differ, or other is this accumulator.
        """
        if not isinstance(other, Covariance):
            raise TypeError(f"other is a {type(other).__name__}; it must be a Covariance")
        if other is self:
            raise ValueError("other is this accumulator; it would count every row twice")
        check_equal("other", other._config(), self._config())
        self._settle()
        self._absorb(other._flushed(), other._common)
        return self

    @writable
    def all_reduce(self, group: ProcessGroup | None = None) -> Covariance:
        """Adds the rows of all processes of the group: all of them then hold the same bits.

        These are the bits of merging the accumulators in the order of the ranks. Rows that have been reduced are marked
        as common and never sent again: to reduce twice, or to go on with updates and reduce later, counts every row
        once. Without an initialised ``torch.distributed`` nothing happens.

        Every process must call it, with equal dimensions. Each broadcasts its moments once, in fp64: the memory is that
        of one state whatever the number of processes, and the order of the sums is fixed.

        Args:
            group: the processes; None means all. Use one group for the life of an accumulator.
        """
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        rank = distributed.get_rank(group)
        if rank < 0:  # not a member
            return self
        if not self._pinned and "nccl" in distributed.get_backend(group):
            self._move(torch.device("cuda", torch.cuda.current_device()))
        self._settle()
        packet, total = pack(self._own), self._empty()
        for source in range(distributed.get_world_size(group)):
            received = packet if source == rank else torch.empty_like(packet)
            sender = source if group is None else distributed.get_global_rank(group, source)
            distributed.broadcast(received, sender, group)
            merge_(total, unpack(received, total))
        self._own = self._empty()
        self._absorb({}, total)
        return self

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        return self._device

    @property
    def rounding(self) -> float:
        """The most that rounding can be of a covariance: 2⁻¹⁸, with fp64 products (exact, or fp64 rows) 2⁻⁴⁰.

        Reached by rows of few distinct values only; of continuous ones it is about 1e-7.
        """
        return 2.0**-40 if self.precision == "exact" or self._dtype == torch.float64 else 2.0**-18

    @property
    def count(self) -> int:
        """How many rows (with a lag: pairs) are in: finite ones of positive weight."""
        return int(self._results()["count"])

    @property
    def weight(self) -> float:
        """The sum of their weights."""
        return float(self._results()["weight"])

    @property
    def mean(self) -> Any:
        """(D,) fp64: the weighted mean of the rows; with a lag, of the earlier rows of the pairs.

        With named blocks a dict of (d,) tensors by name; with a lag it has those of the later rows as well, "o_next".
        """
        if not self._schema.named:
            return self._mean("x")
        return {name: self._mean(side)[part] for name, (side, part) in self._schema.places.items()}

    @property
    def mean_y(self) -> Tensor:
        """(E,) fp64: the weighted mean of the rows of y; with a lag (D,), of the later rows of the pairs."""
        return self._mean("y")

    def covariance(self, first: str | None = None, second: str | None = None, *, ddof: float = 1) -> Tensor:
        """The covariance of x, or of two named blocks.

        Args:
            first: a name of a block: the rows of the result; None means all of x.
            second: a name of a block: its columns; None means ``first``.
            ddof: taken off the sum of the weights in the divisor: 1 is unbiased for rows of weight 1 (weights count
                repetitions, as numpy's ``fweights``), 0 divides by the weight.

        Returns:
            (D, D) fp64, or (d₁, d₂) of the blocks.

        Raises:
            ValueError: the weight of the rows is not above ddof, or there is no such block.
        """
        if first is None:
            if second is not None:
                raise ValueError(f"first is None and second is {second!r}; give first, or neither")
            return self._scaled("x", "x", ddof)
        side, rows = self._schema.place("first", first)
        other, columns = self._schema.place("second", first if second is None else second)
        return self._scaled(side, other, ddof)[rows, columns]

    def cross_covariance(self, *, ddof: float = 1) -> Tensor:
        """(D, E) fp64: the covariance of x and y; with a lag h (D, D), C₀ₕ. For ``ddof`` see :meth:`covariance`."""
        return self._scaled("x", "y", ddof)

    def covariance_y(self, *, ddof: float = 1) -> Tensor:
        """(E, E) fp64: the covariance of y; with a lag h (D, D), Cₕₕ. For ``ddof`` see :meth:`covariance`."""
        return self._scaled("y", "y", ddof)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns a copy of everything, as flat tensors: the moments, the unfinished block, ``config`` (JSON as uint8).

        An accumulator that loads it goes on as this one would, to the last bit.
        """
        state = {"config": torch.tensor(list(json.dumps(self._config()).encode()), dtype=torch.uint8, device="cpu")}
        for prefix, part in (("own", self._own), ("common", self._common), ("pending", self._rows.pending())):
            state |= {f"{prefix}.{name}": tensor.clone() for name, tensor in part.items()}
        return state

    @writable
    def load_state_dict(self, state: Mapping[str, Tensor]) -> Covariance:
        """Takes over a :meth:`state_dict` of an accumulator with the same dimensions, blocks, lag and precision.

        Returns:
            The accumulator.

        Raises:
            ValueError: the state does not fit; the message has the keys that differ. Nothing has been changed.
        """
        if "config" not in state:
            raise ValueError(f"state has the keys {list(state)}; the state of a Covariance has 'config'")
        check_equal("state", json.loads(bytes(state["config"].tolist())), self._config())
        own, common, pending = (
            {name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}
            for prefix in ("own", "common", "pending")
        )
        wanted = {f"own.{name}": tensor for name, tensor in self._own.items()}
        wanted |= {f"common.{name}": tensor for name, tensor in self._own.items() if common}
        wanted |= {f"pending.{name}": tensor for name, tensor in self._schema.pending_like(pending).items()}
        check_equal("state", layout(state), layout({"config": state["config"], **wanted}))
        if pending and len(pending["x"]) >= self._rows.rows + self._overlap:
            raise ValueError(f"state has {len(pending['x'])} pending rows, as many as a block or more")
        self._own = {name: tensor.to(self._device, copy=True) for name, tensor in own.items()}
        self._common = {name: tensor.to(self._device, copy=True) for name, tensor in common.items()}
        self._rows.replace(pending, self._device)
        self._dtype, self._read = pending["x"].dtype if pending else None, None
        return self

    def save(self, path: str | Path) -> None:
        """Writes the state to a safetensors file, whole or not at all: a process that is killed leaves the old file."""
        from lamkernels.lam.files import save_tensors

        save_tensors(Path(path), self.state_dict(), {"format": "lamkernels covariance"})

    def load(self, path: str | Path) -> Covariance:
        """Takes over the state of a file that :meth:`save` wrote, and returns the accumulator.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not readable, or its state does not fit (:meth:`load_state_dict`).
        """
        from lamkernels.lam.files import load_tensors

        return self.load_state_dict(load_tensors(Path(path))[0])

    def __repr__(self) -> str:
        sizes = f"{self._schema}, precision={self.precision!r}, backend={self.backend!r}, device='{self._device}'"
        return f"Covariance({sizes}): {self.count} {self._schema.units}"

    def _config(self) -> dict[str, object]:
        return {"format": FORMAT, **self._schema.config(), "precision": self.precision}

    def _empty(self) -> Totals:
        return empty_totals(self._schema.dim, self._schema.second_dim, self._device)

    def _moments(self, block: Columns) -> Totals:
        """The moments of the rows of a block; with a lag h, of the pairs whose earlier row is not among its last h."""
        x, y, weights, starts = block["x"], block.get("y"), block.get("weights"), block.get("starts")
        later, pairs = slice(self._overlap, None), slice(len(x) - self._overlap)
        factors = None if weights is None else weights[pairs]
        if starts is not None:
            episode = starts.cumsum(0)
            within = (episode[pairs] == episode[later]).double()
            factors = within if factors is None else within * factors
        if factors is not None and (factors == 1).all():
            factors = None  # weights of 1 that were given make the same bits as none
        found = moments(x, y, lag=self._schema.lag, weights=factors, precision=self.precision, backend=self.backend)
        count = found.weight
        if factors is not None and weights is not None:  # else the weights are ones and zeros
            finite = x.isfinite().all(1) if y is None else x.isfinite().all(1) & y.isfinite().all(1)
            count = ((factors > 0) & finite[pairs] & finite[later]).sum()
        part = {name: tensor for name, tensor in found._asdict().items() if tensor is not None}
        return {"count": count.to(torch.int64), **part}

    def _flushed(self) -> Totals:
        """A copy of the moments of this process, with the rows that wait for their block to be full."""
        own = {name: tensor.clone() for name, tensor in self._own.items()}
        if self._rows.filled > self._overlap:
            merge_(own, self._moments(self._rows.pending()))
        return own

    def _settle(self) -> None:
        """Puts the waiting rows into the moments; with a lag the last h stay, as earlier rows of pairs to come."""
        self._own, self._read = self._flushed(), None
        self._rows.keep(self._overlap)

    def _absorb(self, own: Totals, common: Totals) -> None:
        if common and not self._common:
            self._common = self._empty()
        for total, part in ((self._own, own), (self._common, common)):
            if part:
                merge_(total, {name: tensor.to(self._device) for name, tensor in part.items()})

    def _move(self, device: torch.device) -> None:
        self._device = device
        self._own = {name: tensor.to(device) for name, tensor in self._own.items()}
        self._common = {name: tensor.to(device) for name, tensor in self._common.items()}
        self._rows.replace(self._rows.pending(), device)

    @writable
    def _results(self, side: str = "x") -> Totals:
        """The moments of all rows; ValueError where the accumulator has no rows of that side."""
        if side == "y" and self._schema.second_dim is None:
            raise ValueError("this accumulator has one kind of rows; a second one comes with dim_y or lag")
        if self._read is None:
            self._read = self._flushed()
            if self._common:
                own, self._read = self._read, {name: tensor.clone() for name, tensor in self._common.items()}
                merge_(self._read, own)
        return self._read

    def _mean(self, side: str) -> Tensor:
        results = self._results(side)
        if results["count"] == 0:
            raise ValueError(f"0 {self._schema.units} are in; a mean needs at least 1")
        return results[f"mean_{side}"].clone()

    def _scaled(self, first: str, second: str, ddof: float) -> Tensor:
        check_number("ddof", ddof, lambda value: 0 <= value < math.inf, "at least 0 and finite")
        results = self._results(second)
        count, weight = int(results["count"]), float(results["weight"])
        if weight <= ddof:
            found = f"{count} {self._schema.units} of weight {weight:g} are in"
            raise ValueError(f"{found}; a covariance with ddof={ddof:g} needs a weight above {ddof:g}")
        scatter = results["xy"].T if (first, second) == ("y", "x") else results[first + second]
        return scatter / (weight - ddof)
