"""``lamkernels.label``: shards of latent action labels, the same bytes by one process, several, or a killed one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from lamkernels._version import __version__
from lamkernels.labelling.labeller import Codebook, Encoder, Labeller, Labels
from lamkernels.labelling.pairs import (
    SHARD_ROWS,
    Ahead,
    Buffer,
    Event,
    Pairs,
    Read,
    ShardEnd,
    SourceEnd,
    read_events,
)
from lamkernels.labelling.shards import (
    FORMATS,
    MANIFEST,
    OPTIONS,
    SOURCES,
    Format,
    Shard,
    differences,
    digest,
    read_json,
    read_shard,
    shard_path,
    write_shard,
)
from lamkernels.lam.files import write_text
from lamkernels.lam.sources import Source, expanded
from lamkernels.processes import PATIENCE
from lamkernels.validation import Metric, Precision, check_integer, check_option

SCHEMA = "lamkernels label 1"
READ_ENTRIES = 2**20  # that a source reads at once: 4 MiB, which stay in the cache until they are copied
# what decides which run a folder is of, but not what is in a shard
NOT_IN_SHARDS = ("batch_size", "sources", "files")
IN_MANIFEST = ("file", "pairs", "not_finite", "index_shape", "vector_shape", "bytes")  # of each shard


def label(
    sources: str | Path | Sequence[str | Path],
    encoder: Encoder,
    codebook: Codebook,
    out: str | Path,
    *,
    format: Format = "parquet",
    vectors: bool = False,
    lag: int = 1,
    batch_size: int = 256,
    shard_rows: int = SHARD_ROWS,
    shape: Sequence[int] | None = None,
    side: int = 64,
    rows: str | None = None,
    metric: Metric | None = None,
    precision: Precision | None = None,
    device: torch.device | str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> dict[str, Any] | None:
    """Labels every pair (o, o') of consecutive observations with its latent action, and writes the labels as shards.

    A run that was stopped, by a signal or a failure, goes on when it is started again: the files in ``out`` are then,
    byte for byte, those of a run that nothing stopped. Under a process group (``torchrun``) the processes share the
    shards, which come out the same. Shards are whole or absent, and ``_manifest.json`` comes last.

    A shard holds the pairs of ``shard_rows`` rows of one source: the columns source, episode, t (the row of o in its
    episode), row (the row of o in the source), indices and, if asked for, vectors; see docs/labelling.md.
    A pair whose row of the encoder is not finite gets the index −1, and the manifest counts such pairs.

    Args:
        sources: files, folders and games, as for :class:`lamkernels.lam.Source`.
        encoder: as for :class:`lamkernels.labelling.Labeller`.
        codebook: the same.
        out: folder of the shards, the options and the manifest.
        format: "parquet" or "safetensors".
        vectors: whether to write the codes beside their indices, as float32.
        lag: rows from o to o'.
        batch_size: pairs that the encoder gets at once; the last batch of a shard is smaller. The labels do not depend
            on it where the encoder's rows do not.
        shard_rows: rows of a source that make a shard.
        shape: that the encoder wants an observation in, such as (3, 64, 64); None gives it flat.
        side: height and width to which the frames of videos and games are resized, pixels.
        rows: the name of the array or column of rows; None looks for the usual ones.
        metric: of the lookup, as for :class:`lamkernels.labelling.Labeller`.
        precision: the same.
        device: the same.
        about: what else the labels depend on, as JSON: kept in the manifest, and compared when a run goes on. A plain
            function as the encoder is known by its name alone: say here what it was made from.
        progress: whether to show a bar; None shows it on a terminal.

    Returns:
        What ``_manifest.json`` holds, on the first process; None on the others.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: one is out of its range; no row can be read; or ``out`` holds labels of another run, and the message
            names what differs.
        FileNotFoundError: there is no such source.
        ModuleNotFoundError: a kind of file needs a package that is not installed.
    """
    for name, value in (("lag", lag), ("batch_size", batch_size), ("shard_rows", shard_rows), ("side", side)):
        check_integer(name, value)
    check_option("format", format, FORMATS)
    names = tuple(expanded(sources))
    labeller = Labeller(encoder, codebook, metric=metric, precision=precision, shape=shape, device=device)
    options = {
        "schema": SCHEMA,
        "sources": list(names),
        "files": {name: _stamp(Path(name)) for name in names if Path(name).exists()},
        "format": format,
        "vectors": bool(vectors),
        "lag": lag,
        "batch_size": batch_size,
        "shard_rows": shard_rows,
        "side": side,
        "rows": rows,
        **labeller.description(),
        "about": dict(about or {}),
    }
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    run = Run(Path(out), json.loads(json.dumps(options)), names, labeller, rank, world)
    group = distributed.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
    run.check()
    if not rank:
        run.prepare()
    if group is not None:
        distributed.barrier(group)
    run.make_shards(progress)
    if group is not None:
        distributed.barrier(group)
    return None if rank else run.finish()


def _stamp(path: Path) -> list[int]:
    file = path.stat()
    return [file.st_size, file.st_mtime_ns]


@dataclass(frozen=True)
class Run:
    """One process's part of a labelling run.

    Attributes:
        out: the folder.
        options: what decides the files, as JSON.
        sources: files and games, in order.
        labeller: makes the labels.
        rank: of this process.
        world: how many there are.
    """

    out: Path
    options: dict[str, Any]
    sources: tuple[str, ...]
    labeller: Labeller
    rank: int
    world: int

    def check(self) -> None:
        """Raises ValueError where the folder holds something else than this run."""
        path = self.out / OPTIONS
        if path.exists():
            found = differences(read_json(path), self.options)
            if found:
                raise ValueError(
                    f"out is {self.out}, which holds labels of another run; its {'; its '.join(found)}. Give another "
                    "folder, or remove this one"
                )
        elif any(self.out.glob("part-*")):
            raise ValueError(f"out is {self.out}, which holds shards, but no {OPTIONS}; give another folder")

    def prepare(self) -> None:
        """Puts the options into the folder, and what a killed run left half-written out of it."""
        for folder in (self.out, self.out / SOURCES):
            for half in folder.glob(".*.part"):
                half.unlink()
        if not (self.out / OPTIONS).exists():
            write_text(self.out / OPTIONS, json.dumps(self.options, indent=1) + "\n")
        manifest = self.out / MANIFEST
        if manifest.exists():
            shards = [shard["file"] for source in read_json(manifest)["sources"] for shard in source["shards"]]
            if not all((self.out / name).exists() for name in shards):
                manifest.unlink()

    def make_shards(self, progress: bool | None) -> None:
        """Makes the shards of this process that are not there."""
        from tqdm import tqdm

        if (self.out / MANIFEST).exists():
            return
        todo = [index for index in range(len(self.sources)) if not self._is_done(index)]
        if not todo:
            return
        hidden = self.rank > 0 or (None if progress is None else not progress)
        ahead = Ahead(partial(self._events, todo, self._width()), self.options["batch_size"], self.labeller.device)
        with tqdm(unit="row", unit_scale=True, disable=hidden) as bar, ahead.running() as events:
            for index in todo:
                bar.set_description(Path(self.sources[index]).name)
                parts: list[tuple[Pairs, Labels]] = []
                for event in events:
                    if isinstance(event, Pairs):
                        labels = self.labeller(event.o, event.o_next)
                        if not self.options["vectors"]:  # their shape alone is kept
                            labels = labels._replace(vectors=labels.vectors.new_empty(0, *labels.vectors.shape[1:]))
                        parts.append((event, labels))
                    elif isinstance(event, ShardEnd):
                        self._write(index, event.shard, parts)
                        parts = []
                    elif isinstance(event, Read):
                        bar.update(event.rows)
                    else:
                        self._record(index, event)
                        break

    def finish(self) -> dict[str, Any]:
        """Writes the manifest, the last file, and returns it."""
        path = self.out / MANIFEST
        if not path.exists():
            sources = [self._summary(index) for index in range(len(self.sources))]
            totals = {name: sum(source[name] for source in sources) for name in ("rows", "pairs", "not_finite")}
            made_by = {"lamkernels": __version__, "torch": torch.__version__}
            manifest = {"options": self.options, "made_by": made_by, **totals, "sources": sources}
            write_text(path, json.dumps(manifest, indent=1) + "\n")
        for record in (self.out / SOURCES).glob("*.json"):
            record.unlink()
        if (self.out / SOURCES).exists():
            (self.out / SOURCES).rmdir()
        return read_json(path)

    # what this process does

    @property
    def _by_source(self) -> bool:
        """Whether the processes share the sources; else they share the shards, and each reads every source."""
        return len(self.sources) >= 2 * self.world

    def _owns(self, index: int, shard: int) -> bool:
        return (index if self._by_source else index + shard) % self.world == self.rank

    def _is_done(self, index: int) -> bool:
        if self._by_source and not self._owns(index, 0):
            return True
        record = self._record_path(index)
        return record.exists() and not any(self._wants(index, shard) for shard in read_json(record)["shards"])

    def _wants(self, index: int, shard: int) -> bool:
        path = self._shard_path(index, shard)
        if not self._owns(index, shard) or not path.exists():
            return self._owns(index, shard)
        if read_shard(path).run != self._digest:
            raise ValueError(f"out holds {path}, a shard of another run; remove it, and it is made again")
        return False

    @cached_property
    def _digest(self) -> str:
        return digest({key: value for key, value in self.options.items() if key not in NOT_IN_SHARDS})

    # reading

    def _source(self, index: int) -> Source:
        options = {name: self.options[name] for name in ("side", "rows")}
        return Source(self.sources[index], **options, batch_entries=READ_ENTRIES)

    def _width(self) -> int:
        """Entries of a row, as the first source has them that can be read."""
        reasons = []
        for index in range(len(self.sources)):
            source = self._source(index)
            for batch in source:
                width = batch.rows.shape[1]
                if self.labeller.shape is not None and math.prod(self.labeller.shape) != width:
                    raise ValueError(
                        f"shape is {self.labeller.shape}, and the rows of {batch.source} have {width} entries; they "
                        "must be as many"
                    )
                return width
            reasons += [f"{skipped.source}: {skipped.reason}" for skipped in source.skipped]
        raise ValueError(f"no rows could be read; {'; '.join(reasons) or 'the sources are empty'}")

    def _events(self, todo: Sequence[int], width: int, buffer: Callable[[int], Buffer]) -> Iterator[Event]:
        lag, batch_size, shard_rows = (self.options[name] for name in ("lag", "batch_size", "shard_rows"))
        for index in todo:
            wanted = partial(self._wants, index)
            yield from read_events(
                self._source(index), lag, batch_size, shard_rows, width=width, wanted=wanted, buffer=buffer
            )

    # writing

    def _shard_path(self, index: int, shard: int) -> Path:
        return shard_path(self.out, index, shard, self.options["format"])

    def _record_path(self, index: int) -> Path:
        return self.out / SOURCES / f"{index:05d}.json"

    def _write(self, index: int, shard: int, parts: Sequence[tuple[Pairs, Labels]]) -> None:
        columns = {name: torch.cat([getattr(pairs, name) for pairs, _ in parts]) for name in ("episode", "t", "row")}
        columns["indices"] = torch.cat([labels.indices for _, labels in parts]).cpu()
        vector_shape = tuple(parts[0][1].vectors.shape[1:])
        if self.options["vectors"]:
            columns["vectors"] = torch.cat([labels.vectors.float() for _, labels in parts]).cpu()
        indices = columns["indices"]
        not_finite = int((indices.reshape(len(indices), -1) < 0).any(1).sum())
        about = Shard(
            self.sources[index], shard, len(indices), not_finite, tuple(indices.shape[1:]), vector_shape, self._digest
        )
        write_shard(self._shard_path(index, shard), about, columns)

    def _record(self, index: int, end: SourceEnd) -> None:
        """Notes what the source holds: one process does, and each knows it."""
        if self._by_source or not self.rank:
            write_text(self._record_path(index), json.dumps(end._asdict()) + "\n")

    def _summary(self, index: int) -> dict[str, Any]:
        record = read_json(self._record_path(index))
        shards = []
        for number in record["shards"]:
            path = self._shard_path(index, number)
            if not path.exists():
                raise FileNotFoundError(f"there is no {path}; out must be on a file system that every process sees")
            shards.append(read_shard(path)._asdict() | {"file": path.name, "bytes": path.stat().st_size})
        return {
            "source": self.sources[index],
            **{name: record[name] for name in ("rows", "episodes", "skipped")},
            **{name: sum(shard[name] for shard in shards) for name in ("pairs", "not_finite")},
            "shards": [{name: shard[name] for name in IN_MANIFEST} for shard in shards],
        }
