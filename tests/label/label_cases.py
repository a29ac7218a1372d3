"""What the tests of labelling share: sources, an encoder, the labels they must get, readers of the shards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lamkernels.labelling import shards

parquet = pytest.importorskip("pyarrow.parquet")

ROWS, DIM, SLOTS, D, K = 500, 6, 2, 3, 7
STARTS = np.isin(np.arange(ROWS), [0, 50, 51, 53, 300])
CODEBOOK = torch.randn(K, D, generator=torch.Generator().manual_seed(1))


def features(seed, rows=ROWS):
    return np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)


def encoder(o, o_next):
    """Entry by entry, so that no row depends on the others, to the last bit."""
    return (o_next - 0.5 * o).reshape(len(o), SLOTS, D)


def expected(rows, starts, lag=1):
    """Episode, t, row and codes of every pair, one after another, in fp64."""
    found, episode, begin = [], -1, 0
    for row in range(len(rows)):
        if starts[row]:
            episode, begin = episode + 1, row
        if row + lag < len(rows) and not starts[row + 1 : row + lag + 1].any():
            x = (torch.from_numpy(rows[row + lag]) - 0.5 * torch.from_numpy(rows[row])).view(SLOTS, 1, D)
            codes = (x.double() - CODEBOOK.double()).square().sum(-1).argmin(-1)
            found.append((episode, row - begin, row, codes.tolist()))
    return found


def read(out):
    """(source, episode, t, row, indices) of every pair of a folder, and the vectors where they are there."""
    found, vectors = [], []
    for source in json.loads((out / "_manifest.json").read_text())["sources"]:
        for shard in source["shards"]:
            path = out / shard["file"]
            if path.suffix == ".parquet":
                table = parquet.read_table(path)
                columns = [table[name].to_pylist() for name in ("source", "episode", "t", "row", "indices")]
                vectors += table["vectors"].to_pylist() if "vectors" in table.column_names else []
            else:
                tensors = load_file(path)
                columns = [[shards.read_shard(path).source] * len(tensors["t"])]
                columns += [tensors[name].tolist() for name in ("episode", "t", "row")]
                columns += [tensors["indices"].reshape(len(tensors["t"]), -1).tolist()]
                vectors += tensors["vectors"].flatten(1).tolist() if "vectors" in tensors else []
            assert {shard["pairs"]} == {len(column) for column in columns}
            found += list(zip(*columns, strict=True))
    return found, vectors


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def labels_of(folder):
    return {name: content for name, content in files(folder).items() if name.startswith("part-")}


def write_source(path):
    rows, starts = features(0), STARTS
    if path.suffix == ".npy":
        starts = np.arange(ROWS) == 0
        np.save(path, rows)
    elif path.suffix == ".npz":
        np.savez(path, rows=rows, starts=starts)
    elif path.suffix == ".safetensors":
        save_file({"frames": torch.from_numpy(rows), "starts": torch.from_numpy(starts)}, path)
    elif path.suffix == ".parquet":
        import pyarrow

        columns = {"observation.state": list(rows), "episode_index": starts.cumsum() + 3}
        parquet.write_table(pyarrow.table(columns), path)
    return rows, starts


FACTORY = """
import time
import torch

def make(wait=0.0):
    def encoder(o, o_next):
        time.sleep(wait)
        return (o_next - 0.5 * o).reshape(len(o), 2, 3)
    return encoder

def module(weight=1.0):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(weight))
        def forward(self, o, o_next):
            return self.weight * (o_next - 0.5 * o).reshape(len(o), 2, 3)
    return Scaled()
"""
