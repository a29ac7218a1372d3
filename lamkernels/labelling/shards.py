"""The files of a labelling run: shards, what is known of each source, the options, and the manifest."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lamkernels.lam.files import replacing, save_tensors

Format = Literal["parquet", "safetensors"]
FORMATS = ("parquet", "safetensors")
KEY = "lamkernels"  # of the metadata of a shard
# the underscore: pyarrow, pandas and Spark read a folder of shards without them
OPTIONS, MANIFEST, SOURCES = "_options.json", "_manifest.json", ".sources"


class Shard(NamedTuple):
    """What the metadata of a shard say.

    Attributes:
        source: the file or game.
        shard: its number in the source.
        pairs: how many.
        not_finite: those of them with an index of −1.
        index_shape: of the indices of a pair.
        vector_shape: of its vectors, whether they are in the shard or not.
        run: digest of what the labels depend on.
    """

    source: str
    shard: int
    pairs: int
    not_finite: int
    index_shape: tuple[int, ...]
    vector_shape: tuple[int, ...]
    run: str


def shard_path(out: Path, source: int, shard: int, format: str) -> Path:
    """Where shard ``shard`` of source number ``source`` is."""
    return out / f"part-{source:05d}-{shard:05d}.{format}"


def write_shard(path: Path, shard: Shard, columns: Mapping[str, Tensor]) -> None:
    """Writes a shard, whole or not at all; the same content gives the same bytes.

    Args:
        path: where to, .parquet or .safetensors.
        shard: its metadata.
        columns: "episode", "t", "row" (N,) int64, "indices" (N, *index_shape) int64 and perhaps "vectors"
            (N, *vector_shape) float32.
    """
    about = {KEY: json.dumps(shard._asdict())}  # one key: the library does not keep the order of several
    if path.suffix == ".safetensors":
        save_tensors(path, columns, about)
        return
    pyarrow, parquet = _pyarrow()
    arrays = {"source": pyarrow.DictionaryArray.from_arrays([0] * shard.pairs, [shard.source])}
    for name, values in columns.items():
        flat = pyarrow.array(values.reshape(-1).numpy())
        lists = name in ("indices", "vectors")
        arrays[name] = pyarrow.FixedSizeListArray.from_arrays(flat, values[0].numel()) if lists else flat
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.table(arrays).replace_schema_metadata(about), temporary)


def read_shard(path: Path) -> Shard:
    """The metadata of a shard.

    Raises:
        ValueError: it cannot be read, or is no shard of ours.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                about = file.metadata()[KEY]
        else:
            about = _pyarrow()[1].read_metadata(path).metadata[KEY.encode()]
        fields = json.loads(about)
        return Shard(**fields | {name: tuple(fields[name]) for name in ("index_shape", "vector_shape")})
    except ModuleNotFoundError:
        raise
    except Exception as error:  # what a damaged file raises is up to the library that reads it
        raise ValueError(
            f"{path} is not a readable shard of labels ({error}); remove it, and it is made again"
        ) from error


def digest(options: Mapping[str, Any]) -> str:
    """SHA-256 of the JSON of options."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for each key in which two sets of options differ."""
    lines = []
    for key in sorted({*found, *wanted}):
        one, other = (options.get(key, "absent") for options in (found, wanted))
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            lines += [f"{key}: {line}" for line in differences(one, other)]
        else:
            lines.append(f"{key} was {one!r:.200}, now {other!r:.200}")
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: it holds no such thing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.80}; it must be a JSON object")
    return content


def _pyarrow() -> tuple[Any, Any]:
    return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
