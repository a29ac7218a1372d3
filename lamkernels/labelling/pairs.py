"""Pairs (o, o') of the rows of a source, in batches that do not cross the borders of shards; read ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lamkernels.lam.sources import Source
from lamkernels.validation import check_integer

SHARD_ROWS = 2**16
AHEAD = 2  # batches that are read before they are asked for
BUFFERS = AHEAD + 2  # and one that is filled, and one that is encoded
POLL_SECONDS = 0.05

Buffer: TypeAlias = tuple[Tensor, Tensor]


class Pairs(NamedTuple):
    """Pairs of one shard of a source, in the order of its rows.

    Attributes:
        o: (B, D) float32: the observations.
        o_next: (B, D) float32: those ``lag`` rows later, of the same episode.
        episode: (B,) int64: the number of the episode in the source, from 0.
        t: (B,) int64: the row of o in its episode, from 0.
        row: (B,) int64: the row of o in the source, from 0.
        shard: the shard, ``row // shard_rows``.
    """

    o: Tensor
    o_next: Tensor
    episode: Tensor
    t: Tensor
    row: Tensor
    shard: int


class ShardEnd(NamedTuple):
    """All pairs of a shard that is wanted have come."""

    shard: int


class Read(NamedTuple):
    """So many rows of the source were read."""

    rows: int


class SourceEnd(NamedTuple):
    """What a source held: ``shards`` are those with pairs, ``skipped`` is why it was not read to its end."""

    rows: int
    episodes: int
    shards: tuple[int, ...]
    skipped: str | None


Event: TypeAlias = Pairs | ShardEnd | Read | SourceEnd


def read_pairs(source: Source, *, lag: int = 1, batch_size: int = 256, shard_rows: int = SHARD_ROWS) -> Iterator[Pairs]:
    """The pairs of a source of one file or game, cut into batches as :func:`lamkernels.label` cuts them.

    Args:
        source: of one file or game.
        lag: rows from o to o'.
        batch_size: pairs of a batch; the last one of a shard has fewer.
        shard_rows: rows of the source whose pairs make a shard.

    Yields:
        :class:`Pairs`. No pair crosses the start of an episode.

    Raises:
        TypeError: lag, batch_size or shard_rows is not an int.
        ValueError: it is below 1, or the source cannot be read.
    """
    for name, value in (("lag", lag), ("batch_size", batch_size), ("shard_rows", shard_rows)):
        check_integer(name, value)
    for event in read_events(source, lag, batch_size, shard_rows):
        if isinstance(event, Pairs):
            yield event
        elif isinstance(event, SourceEnd) and event.skipped is not None:
            raise ValueError(f"{source.skipped[0].source} cannot be read: {event.skipped}")


def read_events(
    source: Source,
    lag: int,
    batch_size: int,
    shard_rows: int,
    *,
    width: int | None = None,
    wanted: Callable[[int], bool] = lambda shard: True,
    buffer: Callable[[int], Buffer] | None = None,
) -> Iterator[Event]:
    """The pairs of the shards that are wanted, and what comes of the source.

    Args:
        source: of one file or game.
        lag: rows from o to o'.
        batch_size: pairs of a batch.
        shard_rows: rows of a shard.
        width: D; a source of another one is skipped. None takes any.
        wanted: asked once for each shard that has pairs.
        buffer: gives two tensors (batch_size, D) float32 to be filled, D its argument; None allocates new ones.

    Yields:
        In order: the pairs of each wanted shard, then its end; how many rows were read; at last, the source's end.
    """
    filled = _Batch(batch_size, buffer or (lambda dim: (torch.empty(batch_size, dim), torch.empty(batch_size, dim))))
    rows_read = episodes = 0
    skipped: str | None = None
    tail: Tensor | None = None  # the last ``lag`` rows
    places = torch.empty(0, 3, dtype=torch.int64)  # of these: episode, t, row
    shards: list[int] = []
    open_shard: int | None = None  # the wanted one whose pairs are coming
    for batch in source:
        if width is not None and batch.rows.shape[1] != width:
            skipped = f"its rows have {batch.rows.shape[1]} entries; those of the first source have {width}"
            break
        tail = batch.rows[:0] if tail is None else tail
        new = _places(batch.starts, rows_read, places)
        rows_read, episodes = rows_read + len(batch.rows), int(new[-1, 0]) + 1
        border = torch.cat([tail, batch.rows[:lag]]), torch.cat([places, new[:lag]])
        for rows, at in (border, (batch.rows, new)):
            o = (at[:-lag, 0] == at[lag:, 0]).nonzero().flatten()  # the rows whose pair is of the same episode
            for shard, part in _by_shard(o, at, shard_rows):
                if not shards or shards[-1] != shard:
                    if open_shard is not None:
                        yield from filled.rest(open_shard)
                        yield ShardEnd(open_shard)
                    shards.append(shard)
                    open_shard = shard if wanted(shard) else None
                if open_shard is not None:
                    yield from filled.add(shard, rows, at, part, lag)
        yield Read(len(batch.rows))
        tail = torch.cat([tail, batch.rows[-lag:]])[-lag:]
        places = torch.cat([places, new[-lag:]])[-lag:]
    if open_shard is not None:
        yield from filled.rest(open_shard)
        yield ShardEnd(open_shard)
    if skipped is None and source.skipped:
        skipped = source.skipped[0].reason
    yield SourceEnd(rows_read, episodes, tuple(shards), skipped)


def _places(starts: Tensor, first: int, before: Tensor) -> Tensor:
    """(N, 3): episode, t and row of rows that follow those of ``before``."""
    row = torch.arange(first, first + len(starts))
    episode = starts.cumsum(0) + (int(before[-1, 0]) if len(before) else -1)
    begin = torch.where(starts, row, int(before[-1, 2] - before[-1, 1]) if len(before) else 0).cummax(0).values
    return torch.stack([episode, row - begin, row], 1)


def _by_shard(o: Tensor, places: Tensor, shard_rows: int) -> Iterator[tuple[int, Tensor]]:
    shards, counts = torch.unique_consecutive(places[o, 2] // shard_rows, return_counts=True)
    yield from zip(shards.tolist(), torch.split(o, counts.tolist()), strict=True)


class _Batch:
    """Pairs that wait until there are ``size`` of them."""

    def __init__(self, size: int, buffer: Callable[[int], Buffer]) -> None:
        self.size, self.buffer, self.count = size, buffer, 0
        self.pair: Buffer | None = None
        self.places: list[Tensor] = []

    def add(self, shard: int, rows: Tensor, places: Tensor, o: Tensor, lag: int) -> Iterator[Pairs]:
        """Copies the rows o and o + lag, and yields each batch that they complete."""
        while len(o):
            if self.pair is None:
                self.pair = self.buffer(rows.shape[1])
            taken, o = o[: self.size - self.count], o[self.size - self.count :]
            stop = self.count + len(taken)
            for target, index in zip(self.pair, (taken, taken + lag), strict=True):
                first, last = int(index[0]), int(index[-1])
                if last - first + 1 == len(index):  # one episode: a copy, no gather
                    target[self.count : stop].copy_(rows[first : last + 1])
                else:
                    torch.index_select(rows, 0, index, out=target[self.count : stop])
            self.places.append(places[taken])
            self.count = stop
            if self.count == self.size:
                yield from self.rest(shard)

    def rest(self, shard: int) -> Iterator[Pairs]:
        """The pairs that wait, if any."""
        if self.pair is not None:
            o, o_next = (rows[: self.count] for rows in self.pair)
            episode, t, row = torch.cat(self.places).unbind(1)
            yield Pairs(o, o_next, episode, t, row, shard)
            self.pair, self.places, self.count = None, [], 0


class Ahead:
    """Runs a generator of events in a thread, a few batches ahead, and brings the batches to a device.

    Batches go through few pairs of buffers, which are used again: one that came out is valid until the next one. For a
    GPU they are pinned, and copied on a stream of their own while the GPU computes.

    Args:
        events: the generator, given the function that it takes its buffers from.
        batch_size: rows of a buffer.
        device: where to.
    """

    def __init__(
        self, events: Callable[[Callable[[int], Buffer]], Iterator[Event]], batch_size: int, device: torch.device
    ) -> None:
        self._events, self._batch_size, self._device = events, batch_size, device
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._lent: queue.SimpleQueue[Buffer] = queue.SimpleQueue()  # in the order in which their batches come out
        self._made = 0
        self._out: queue.Queue[Event | Exception | None] = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._run, name="lamkernels label: reader", daemon=True)

    @contextmanager
    def running(self) -> Iterator[Iterator[Event]]:
        """The events, while the thread runs; it has ended at the end of the block, however that is left."""
        self._thread.start()
        try:
            yield self._drawn()
        finally:
            self._stopped.set()
            while self._thread.is_alive():  # it may wait for room
                with suppress(queue.Empty):
                    self._out.get(timeout=POLL_SECONDS)

    def _drawn(self) -> Iterator[Event]:
        while (event := self._out.get()) is not None:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Pairs) and self._stream is not None:
                for rows in (event.o, event.o_next):  # allocated on the reader's stream, used on this one
                    rows.record_stream(torch.cuda.current_stream(self._device))
            yield event
            if isinstance(event, Pairs) and self._stream is None:
                self._free.put(self._lent.get())

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                for event in self._events(self._buffer):
                    self._out.put(
                        event if self._stream is None or not isinstance(event, Pairs) else self._copied(event)
                    )
                    if self._stopped.is_set():
                        break
            self._out.put(None)
        except Exception as error:
            self._out.put(error)

    def _buffer(self, dim: int) -> Buffer:
        while not self._stopped.is_set():
            with suppress(queue.Empty):
                buffer = self._free.get(timeout=POLL_SECONDS if self._made == BUFFERS else 0)
                self._lent.put(buffer)
                return buffer
            if self._made < BUFFERS:
                self._made += 1
                o, o_next = (torch.empty(self._batch_size, dim, pin_memory=self._stream is not None) for _ in range(2))
                self._free.put((o, o_next))
        raise RuntimeError("the reader was stopped")

    def _copied(self, pairs: Pairs) -> Pairs:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            o, o_next = (rows.to(self._device, non_blocking=True) for rows in (pairs.o, pairs.o_next))
        self._stream.synchronize()  # this thread waits, and nobody else
        self._free.put(self._lent.get())
        return pairs._replace(o=o, o_next=o_next)
