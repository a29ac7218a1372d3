"""Parquet files: columns of numbers, or of lists of numbers, as tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def package(module: str, package: str, path: Path) -> Any:
    """A module that ``path`` needs.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs {package}: pip install {package}") from error


def parquet_parts(
    path: Path, choose: Callable[[Iterable[str]], dict[str, str]], entries: int
) -> Iterator[dict[str, Tensor]]:
    """Consecutive rows of the columns that ``choose`` names, by what they stand for, about ``entries`` numbers each."""
    parquet = package("pyarrow.parquet", "pyarrow", path)
    # read in parts: else a row group is in memory as a whole
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        chosen = choose(file.schema_arrow.names)
        # only the data know the length of a list: the first row says how many rows make a batch
        first = next(file.iter_batches(1, columns=[chosen["rows"]]), None)
        width = 1 if first is None else column(first.column(0)).numel()
        for batch in file.iter_batches(max(1, entries // max(1, width)), columns=list(chosen.values())):
            yield {kind: column(batch.column(name)) for kind, name in chosen.items()}


def column(values: Any) -> Tensor:
    """An Arrow array of numbers (N,), or of lists of them, as long as each other, (N, ...)."""
    compute = importlib.import_module("pyarrow.compute")
    shape = [len(values)]
    while "list" in str(values.type):
        lengths = compute.unique(compute.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or values.null_count:
            raise ValueError(f"a column has lists of the lengths {lengths[:5]}; they must be equal")
        shape.append(lengths[0])
        values = values.flatten()
    if values.null_count:
        raise ValueError("a column has empty entries")
    return torch.from_numpy(np.array(values.to_numpy(zero_copy_only=False))).reshape(shape)
