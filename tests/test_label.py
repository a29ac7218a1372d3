"""Labels are those of a plain loop over pairs, and the same bytes by any batch size, number of processes or kills."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lamkernels as lk
from lamkernels.cli import main
from lamkernels.labelling import Labeller, Labels, read_pairs, run, shards
from lamkernels.lam import Batch, Source

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


@pytest.fixture
def data(tmp_path):
    """Two sources with episodes, and one without."""
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "a.npz", features=features(0), starts=STARTS)
    save_file({"rows": torch.from_numpy(features(1)), "starts": torch.from_numpy(STARTS)}, folder / "b.safetensors")
    np.save(folder / "c.npy", features(2, 90))
    return folder


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


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
@pytest.mark.parametrize(("lag", "shard_rows", "batch_size"), [(1, 100, 33), (3, 51, 7), (60, 1000, 1000)])
def test_every_pair_of_a_file_gets_its_code(tmp_path, format, suffix, lag, shard_rows, batch_size):
    path, out = tmp_path / f"a{suffix}", tmp_path / "out"
    rows, starts = write_source(path)
    manifest = lk.label(
        str(path), encoder, CODEBOOK, out, format=format, vectors=True, lag=lag, shard_rows=shard_rows,
        batch_size=batch_size,
    )  # fmt: skip
    found, vectors = read(out)
    wanted = expected(rows, starts, lag)
    assert found == [(str(path), *pair) for pair in wanted]
    assert manifest["pairs"] == len(wanted) and manifest["rows"] == ROWS and manifest["not_finite"] == 0
    assert manifest["sources"][0]["episodes"] == starts.sum()
    indices = torch.tensor([pair[3] for pair in wanted])
    assert torch.equal(torch.tensor(vectors), CODEBOOK[indices].flatten(1))
    numbers = sorted({row // shard_rows for _, _, row, _ in wanted})
    assert [shard["file"] for shard in manifest["sources"][0]["shards"]] == [
        f"part-00000-{number:05d}.{format}" for number in numbers
    ]
    assert json.loads((out / "_manifest.json").read_text()) == manifest


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_videos_and_shapes(tmp_path, format):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 250, 10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    def brightness(o, o_next):
        assert o.shape[1:] == (8, 8, 3)
        return o_next.mean((1, 2))[:, :1]

    levels = torch.tensor([[0.0], [0.5], [1.0]])
    lk.label(path, brightness, levels, tmp_path / "out", format=format, side=8, shape=(8, 8, 3), batch_size=4)
    found, _ = read(tmp_path / "out")
    assert [(row[2], row[4]) for row in found] == [
        (t, [int((10 * (t + 1) / 255 - levels).abs().argmin())]) for t in range(24)
    ]


def test_games_have_no_file(tmp_path, monkeypatch):
    class Played(Source):
        def __iter__(self):
            yield Batch(torch.from_numpy(features(0)), torch.from_numpy(STARTS), None, "atari:pong")

    monkeypatch.setattr(run, "Source", Played)
    manifest = lk.label("atari:pong", encoder, CODEBOOK, tmp_path / "out", format="safetensors")
    assert read(tmp_path / "out")[0] == [("atari:pong", *pair) for pair in expected(features(0), STARTS)]
    assert manifest["options"]["files"] == {}


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_the_labels_do_not_depend_on_the_batch_size(tmp_path, data, format):
    found = []
    for batch_size in (1, 7, 256, 10_000):
        out = tmp_path / str(batch_size)
        lk.label(data, encoder, CODEBOOK, out, format=format, vectors=True, batch_size=batch_size, shard_rows=200)
        found.append(labels_of(out))
    assert len(found[0]) == 7 and all(other == found[0] for other in found[1:])


def test_the_codes_of_a_bit_exact_encoder_do_not_depend_on_the_batch_size():
    x = torch.randn(3000, 4, 32)
    codebook = torch.randn(64, 32)
    whole = Labeller(lambda o, _: o.view(-1, 4, 32), codebook)(x.flatten(1), x.flatten(1))
    for size in (1, 2, 13, 1000):
        parts = [Labeller(lambda o, _: o.view(-1, 4, 32), codebook)(p, p).indices for p in x.flatten(1).split(size)]
        assert torch.equal(torch.cat(parts), whole.indices)


# codebooks of every kind


def labels(x, codebook, **options):
    return Labeller(lambda o, _: o.view(x.shape).to(x.dtype), codebook, **options)(x.flatten(1), x.flatten(1))


def test_a_codebook_per_head():
    x, codebook = torch.randn(40, 2, 4, D), torch.randn(2, K, D)
    found = labels(x, codebook)
    assert found.indices.shape == (40, 2, 4)
    for head in range(2):
        wanted = torch.cdist(x[:, head].reshape(-1, D).double(), codebook[head].double()).argmin(-1).view(40, 4)
        assert torch.equal(found.indices[:, head], wanted)
        assert torch.equal(found.vectors[:, head], codebook[head][wanted])


def test_a_residual_list():
    x, codebooks = torch.randn(40, 2, D), [torch.randn(K, D), 0.3 * torch.randn(4, D), 0.1 * torch.randn(9, D)]
    found = labels(x, codebooks)
    rest, total = x, torch.zeros_like(x)
    for position, codes in enumerate(codebooks):
        wanted = torch.cdist(rest.double(), codes.double()).argmin(-1)
        assert torch.equal(found.indices[..., position], wanted)
        rest, total = rest - codes[wanted], total + codes[wanted]
    assert found.indices.shape == (40, 2, 3) and torch.equal(found.vectors, total)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_metrics(metric):
    x = torch.randn(40, D)
    scores = (
        x.double() @ (nn.functional.normalize(CODEBOOK.double(), dim=-1) if metric == "cosine" else CODEBOOK.double()).T
    )
    found = labels(x, CODEBOOK, metric=metric)
    assert torch.equal(found.indices, scores.argmax(-1)) and torch.equal(found.vectors, CODEBOOK[found.indices])


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
)
def test_dtypes_meet_without_loss(x_dtype, dtype):
    x, codebook = torch.randn(40, D).to(x_dtype), CODEBOOK.to(dtype)
    assert torch.equal(labels(x, codebook).indices, torch.cdist(x.double(), codebook.double()).argmin(-1))


@pytest.mark.parametrize(
    "module",
    [
        lk.VectorQuantize(D, K),
        lk.VectorQuantize(D, K, metric="cosine"),
        lk.SimVQ(D, K),
        lk.FSQ([3, 3, 2]),
        lk.LFQ(D),
    ],
    ids=["VectorQuantize", "cosine", "SimVQ", "FSQ", "LFQ"],
)
def test_modules(module):
    module.eval()
    x = torch.randn(40, 2, D)
    quantized, indices, _ = module(x)
    x[3, 1, 0], x[7, 0, 2] = torch.nan, torch.inf
    found = labels(x, module)
    bad = ~x.isfinite().all(-1)
    assert torch.equal(found.indices, indices.masked_fill(bad, -1))
    assert torch.equal(found.vectors[~bad], quantized[~bad]) and bool(found.vectors[bad].isnan().all())


def test_modules_of_another_library():
    vqp = pytest.importorskip("vector_quantize_pytorch")
    module = vqp.ResidualVQ(dim=D, codebook_size=K, num_quantizers=3).eval()
    x = torch.randn(40, 2, D)
    quantized, indices, _ = module(x)
    found = labels(x, module)
    assert torch.equal(found.indices, indices) and torch.equal(found.vectors, quantized)


@pytest.mark.parametrize("codebook", [CODEBOOK, [CODEBOOK, CODEBOOK], lk.VectorQuantize(D, K).eval()])
@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_rows_that_are_not_finite(tmp_path, codebook, format):
    rows = features(0, 60)
    rows[10, 0], rows[20, 4] = np.nan, np.inf  # of the first and of the second slot
    np.save(tmp_path / "a.npy", rows)
    manifest = lk.label(tmp_path / "a.npy", encoder, codebook, tmp_path / "out", format=format, vectors=True)
    found, vectors = read(tmp_path / "out")
    bad = {9: 0, 10: 0, 19: 1, 20: 1}
    for (_, _, _, row, indices), vector in zip(found, torch.tensor(vectors).view(-1, SLOTS, D), strict=True):
        for slot in range(SLOTS):
            index = torch.tensor(indices).view(SLOTS, -1)[slot]
            assert bool((index == -1).all() if bad.get(row) == slot else (index >= 0).all())
            assert bool(vector[slot].isnan().all()) == (bad.get(row) == slot)
    assert manifest["not_finite"] == 4 == manifest["sources"][0]["shards"][0]["not_finite"]


# killed, shared, damaged

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


@pytest.fixture
def arguments(tmp_path, data, monkeypatch):
    """Of the command, with a factory and a codebook in files."""
    (tmp_path / "labelfactory.py").write_text(FACTORY)
    save_file({"codes": CODEBOOK, "other": CODEBOOK.clone()}, tmp_path / "codebook.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "labelfactory", raising=False)
    codebook = f"{tmp_path / 'codebook.safetensors'}:codes"
    return ["label", str(data), "--encoder", "labelfactory:make", "--codebook", codebook, "--shard-rows", "100"]


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, arguments, format):
    arguments = [*arguments, "--format", format, "--vectors", "--batch-size", "10", "--encoder-option", "wait=0.02"]
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, "-m", "lamkernels.cli", *arguments, "--out", str(killed)]
    for goal in (2, 6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(labels_of(killed)) < goal:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "_manifest.json").exists()
    kept = {name: (killed / name).stat().st_mtime_ns for name in labels_of(killed)}
    (killed / ".part-00002-00000.parquet.x.part").write_bytes(b"half a shard")
    assert main([*arguments, "--out", str(killed)]) == 0
    assert main([*arguments, "--out", str(undisturbed)]) == 0
    assert files(killed) == files(undisturbed)
    assert all((killed / name).stat().st_mtime_ns == stamp for name, stamp in kept.items()), "made twice"


@pytest.mark.parametrize("sources", [1, 4], ids=["shared by shards", "shared by sources"])
def test_two_processes_write_what_one_does(tmp_path, arguments, sources):
    paths = []
    for index in range(sources):
        paths.append(str(tmp_path / f"{index}.npz"))
        np.savez(paths[-1], features=features(index), starts=STARTS)
    arguments = ["label", *paths, *arguments[2:], "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "lamkernels.cli", *arguments, str(tmp_path / "two")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert done.stdout.count("pairs of") == 1


@pytest.mark.parametrize(("world", "sources"), [(2, 3), (2, 5), (3, 1)])
def test_the_processes_cut_the_work_into_parts(tmp_path, world, sources):
    names = tuple(f"{index}" for index in range(sources))
    parts = [run.Run(tmp_path, {"format": "parquet"}, names, None, rank, world) for rank in range(world)]
    for index in range(sources):
        for shard in range(5):
            assert sum(part._owns(index, shard) for part in parts) == 1


def test_a_shard_is_whole_or_absent(tmp_path, data, monkeypatch):
    write = parquet.write_table

    def failing(table, path, **options):
        write(table.slice(0, 5), path)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "write_table", failing)
        with pytest.raises(OSError, match="no space left"):
            lk.label(data, encoder, CODEBOOK, tmp_path / "out")
    assert list(files(tmp_path / "out")) == ["_options.json"]
    lk.label(data, encoder, CODEBOOK, tmp_path / "out")
    assert read(tmp_path / "out")[0][0][1:] == expected(features(0), STARTS)[0]


def test_an_encoder_that_fails_stops_the_reader(tmp_path, data):
    def failing(o, o_next):
        raise ArithmeticError("of the encoder")

    with pytest.raises(ArithmeticError, match="of the encoder"):
        lk.label(data, failing, CODEBOOK, tmp_path / "out", batch_size=8)
    assert not [thread for thread in threading.enumerate() if "lamkernels" in thread.name]


def test_a_finished_run_is_left_alone_and_a_lost_shard_is_made_again(tmp_path, data):
    out = tmp_path / "out"
    first = lk.label(data, encoder, CODEBOOK, out, shard_rows=100)
    before = files(out)

    def never(o, o_next):
        raise AssertionError("called")

    never.__module__, never.__qualname__ = encoder.__module__, encoder.__qualname__
    assert lk.label(data, never, CODEBOOK, out, shard_rows=100) == first
    (out / "part-00001-00002.parquet").unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert lk.label(data, encoder, CODEBOOK, out, shard_rows=100) == first
    assert files(out) == before
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())


def test_labels_of_another_run_are_refused(tmp_path, data):
    out = tmp_path / "out"
    lk.label(data, encoder, CODEBOOK, out, about={"checkpoint": "a"})
    for changed, message in (
        ({"lag": 2}, "its lag was 1, now 2"),
        (
            {"batch_size": 3, "format": "safetensors"},
            "its batch_size was 256, now 3; its format was 'parquet', now 'saf",
        ),
        ({"codebook": CODEBOOK + 1}, "its codebook_tensors was"),
        ({"encoder": lambda o, n: encoder(o, n)}, "its encoder was 'test_label:encoder'"),
        ({"about": {"checkpoint": "b"}}, "its about: checkpoint was 'a', now 'b'"),
    ):
        given = {"encoder": encoder, "codebook": CODEBOOK, "about": {"checkpoint": "a"}} | changed
        with pytest.raises(ValueError, match=message) as refused:
            lk.label(data, given.pop("encoder"), given.pop("codebook"), out, **given)
        assert str(out) in str(refused.value) and "another folder" in str(refused.value)
    np.save(data / "c.npy", features(3, 90))
    with pytest.raises(ValueError, match=r"its files: .*c\.npy was"):
        lk.label(data, encoder, CODEBOOK, out, about={"checkpoint": "a"})


def test_the_weights_of_an_encoder_are_known(tmp_path, data):
    linear = nn.Linear(DIM, SLOTS * D).eval()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def rows(self, o, o_next):
            return self.linear(o_next - o)

    model = Model().eval()
    codebook = torch.randn(K, SLOTS * D)
    lk.label(data, model.rows, codebook, tmp_path / "out")
    with torch.no_grad():
        linear.weight[0, 0] += 1
    with pytest.raises(ValueError, match="its encoder_tensors was"):
        lk.label(data, model.rows, codebook, tmp_path / "out")


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_a_shard_that_is_damaged_or_of_another_run_is_named(tmp_path, data, format):
    out, other = tmp_path / "out", tmp_path / "other"
    lk.label(data, encoder, CODEBOOK, out, format=format)
    lk.label(data, encoder, CODEBOOK + 1, other, format=format)
    name = f"part-00001-00000.{format}"
    (out / "_manifest.json").unlink()
    for content, message in (
        ((out / name).read_bytes()[:50], "not a readable shard"),
        (b"", "not a readable shard"),
        ((other / name).read_bytes(), "a shard of another run"),
    ):
        (out / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as refused:
            lk.label(data, encoder, CODEBOOK, out, format=format)
        assert name in str(refused.value) and "remove it, and it is made again" in str(refused.value)
    (out / name).unlink()
    lk.label(data, encoder, CODEBOOK, out, format=format)
    assert len(read(out)[0]) == 2 * len(expected(features(0), STARTS)) + 89


def test_shards_without_options_are_no_place(tmp_path, data):
    out = tmp_path / "out"
    lk.label(data, encoder, CODEBOOK, out)
    (out / "_options.json").unlink()
    with pytest.raises(ValueError, match=r"holds shards, but no _options\.json"):
        lk.label(data, encoder, CODEBOOK, out)


def test_the_content_of_a_shard_decides_its_bytes(tmp_path, data):
    code = f"""
import torch, lamkernels as lk
from lamkernels.labelling import shards
shard = shards.Shard("a.npz", 0, 3, 0, (2,), (2, 1), "run")
columns = {{name: torch.arange(3) for name in ("episode", "t", "row")}}
columns |= {{"indices": torch.arange(6).view(3, 2), "vectors": torch.ones(3, 2, 1)}}
for format in shards.FORMATS:
    shards.write_shard(__import__("pathlib").Path(f"{tmp_path}/%s.{{format}}"), shard, columns)
"""
    for name in "ab":  # the seed of hashing differs between processes
        subprocess.run([sys.executable, "-c", code % name], check=True)
    for format in shards.FORMATS:
        one, other = ((tmp_path / f"{name}.{format}").read_bytes() for name in "ab")
        assert one == other
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert list(file.metadata()) == ["lamkernels"]


# sources that are not as they should be


def test_sources_that_cannot_be_read_are_in_the_manifest(tmp_path, data):
    (data / "broken.npz").write_bytes((data / "a.npz").read_bytes()[:1000])
    np.save(data / "wide.npy", np.zeros((30, DIM + 1), np.float32))
    np.save(data / "x.npy", features(5, 1))
    manifest = lk.label(data, encoder, CODEBOOK, tmp_path / "out")
    found = {Path(source["source"]).name: source for source in manifest["sources"]}
    assert "zip" in found["broken.npz"]["skipped"].lower() and found["broken.npz"]["pairs"] == 0
    assert "its rows have 7 entries; those of the first source have 6" in found["wide.npy"]["skipped"]
    assert found["x.npy"] == {
        "source": str(data / "x.npy"), "rows": 1, "episodes": 1, "skipped": None, "pairs": 0, "not_finite": 0,
        "shards": [],
    }  # fmt: skip
    assert manifest["pairs"] == 2 * len(expected(features(0), STARTS)) + 89
    assert lk.label(data, encoder, CODEBOOK, tmp_path / "out") == manifest


def test_pairs_are_there_for_other_engines(data):
    batches = list(read_pairs(Source(data / "a.npz"), batch_size=33, shard_rows=100))
    rows, wanted = torch.from_numpy(features(0)), expected(features(0), STARTS)
    places = [torch.cat([getattr(batch, name) for batch in batches]).tolist() for name in ("episode", "t", "row")]
    assert list(zip(*places, strict=True)) == [pair[:3] for pair in wanted]
    for batch in batches:
        assert torch.equal(batch.o, rows[batch.row]) and torch.equal(batch.o_next, rows[batch.row + 1])
        assert set((batch.row // 100).tolist()) == {batch.shard}
    (data / "a.npz").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        list(read_pairs(Source(data / "a.npz")))


EVALUATING = nn.Linear(3, 3).eval()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"encoder": 3}, TypeError, "encoder is a int; it must be callable"),
        ({"encoder": nn.Linear(3, 3)}, ValueError, r"encoder is in training mode.*\.eval\(\)"),
        ({"encoder": nn.Linear(3, 3).forward}, ValueError, "encoder is in training mode"),
        ({"encoder": lambda o, n: o.long()}, TypeError, "what the encoder returns is torch.int64"),
        ({"encoder": lambda o, n: o.sum()}, ValueError, "what the encoder returns is a scalar"),
        (
            {"encoder": lambda o, n: o[:5, :3]},
            ValueError,
            r"returns shape \(5, 3\) for 256 pairs; it must be \(256, ...",
        ),
        (
            {"encoder": lambda o, n: o},
            ValueError,
            r"returns shape \(256, 6\); for this codebook it must be \(256, ..., 3",
        ),
        ({"codebook": torch.zeros(4, K, D)}, ValueError, r"for this codebook it must be \(256, 4, ..., 3\)"),
        ({"codebook": "a.safetensors"}, TypeError, "codebook is 'a.safetensors'; it must be a tensor"),
        ({"codebook": []}, TypeError, "it must be a tensor"),
        ({"codebook": torch.zeros(3)}, ValueError, r"codebook has shape \(3,\); it must be \(K, D\)"),
        ({"codebook": torch.zeros(3, 3).int()}, TypeError, "codebook is torch.int32"),
        ({"codebook": [CODEBOOK, CODEBOOK[:, :2]]}, ValueError, r"codebook\[1\] has shape \(7, 2\)"),
        ({"codebook": lk.VectorQuantize(D, K)}, ValueError, "codebook is in training mode"),
        ({"codebook": EVALUATING}, TypeError, "does not return"),
        ({"codebook": lk.LFQ(D).eval(), "metric": "dot"}, ValueError, "metric is 'dot'.*both must be None"),
        ({"metric": "l1"}, ValueError, "metric is 'l1'; it must be one of 'l2'"),
        ({"precision": "half"}, ValueError, "precision is 'half'"),
        ({"format": "csv"}, ValueError, "format is 'csv'; it must be one of 'parquet', 'safetensors'"),
        ({"lag": 0}, ValueError, "lag is 0; it must be at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size is 2.0; it must be an int"),
        ({"shard_rows": -1}, ValueError, "shard_rows is -1"),
        ({"shape": (3, 0)}, ValueError, "an entry of shape is 0"),
        ({"shape": (2, 2)}, ValueError, r"shape is \(2, 2\), and the rows of .* have 6 entries"),
        (
            {"device": "meta", "encoder": nn.Linear(3, 3).eval()},
            ValueError,
            "encoder is on cpu; it must be on device meta",
        ),
        ({"rows": "pixels"}, ValueError, "no rows could be read; .*but not pixels for the rows"),
        ({"sources": "nowhere.npy"}, FileNotFoundError, "there is no file or folder nowhere.npy"),
    ],
)
def test_messages(tmp_path, data, changed, error, message):
    given = {"sources": data / "b.safetensors", "encoder": encoder, "codebook": CODEBOOK, "out": tmp_path / "out"}
    with pytest.raises(error, match=message):
        lk.label(**given | changed)
    assert not labels_of(tmp_path / "out")


# the command


def test_the_command(tmp_path, arguments, data, capsys):
    assert main([*arguments, "--out", "out", "--lag", "2", "--vectors"]) == 0
    printed = capsys.readouterr().out
    found, vectors = read(tmp_path / "out")
    wanted = [pair for seed in (0, 1) for pair in expected(features(seed), STARTS, 2)]
    wanted += expected(features(2, 90), np.arange(90) == 0, 2)
    assert [pair[1:] for pair in found] == wanted and len(vectors) == len(wanted)
    assert f"{len(wanted)} pairs of 1090 rows in 11 shards" in printed
    options = json.loads((tmp_path / "out" / "_options.json").read_text())
    assert options["about"] == {"encoder": "labelfactory:make", "encoder_option": {}}


def test_the_command_with_a_module_and_a_residual_list(tmp_path, arguments, capsys):
    arguments[arguments.index("labelfactory:make")] = "labelfactory:module"
    arguments += ["--codebook", f"{tmp_path / 'codebook.safetensors'}:other", "--encoder-option", "weight=0.5"]
    assert main([*arguments, "--out", "out"]) == 0
    pair = read(tmp_path / "out")[0][0]
    rows = torch.from_numpy(features(0))[:2]
    wanted = Labeller(lambda o, n: 0.5 * encoder(o, n), [CODEBOOK, CODEBOOK])(rows[:1], rows[1:])
    assert isinstance(wanted, Labels) and pair[4] == wanted.indices.flatten().tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--encoder", "labelfactory"], "it must be MODULE:FACTORY"),
        (["--encoder", "labelfactory:nothing"], "labelfactory has no callable nothing"),
        (["--encoder", "no_such_module:make"], "No module named 'no_such_module'"),
        (["--encoder-option", "delay=1"], "unexpected keyword argument 'delay'"),
        (["--encoder-option", "delay"], "'delay' is not NAME=VALUE"),
        (["--codebook", "codebook.pt"], "it must be FILE.safetensors"),
        (["--codebook", "codebook.safetensors"], "holds codes, other, but not codebook"),
        (["--codebook", "absent.safetensors"], "there is no file absent.safetensors"),
        (["--shape", "3,x"], "'3,x' is not positive integers"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--lag", "1", "--rows", "pixels"], "no rows could be read"),
    ],
)
def test_wrong_arguments_are_explained(arguments, capsys, changed, message):
    try:
        status = main([*arguments, *changed, "--out", "out"])
    except SystemExit as stop:
        status = stop.code
    assert status and message in capsys.readouterr().err


def test_label_is_loaded_when_it_is_used():
    code = "import sys, lamkernels as lk; assert 'lamkernels.labelling' not in sys.modules; print(lk.label.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "lamkernels.labelling.run"


def test_the_document_runs_as_written(tmp_path):
    document = (Path(__file__).parents[1] / "docs" / "labelling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|bash)\n(.*?)```", document, re.DOTALL)
    call, module = (
        next(text for kind, text in blocks if kind == "python" and part in text) for part in ("lk.label(", "class Enc")
    )
    commands = next(text for kind, text in blocks if kind == "bash").partition("\n")[2]  # behind the installation
    commands = commands.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
    commands = commands.replace("\nlamkernels", "lamkernels")
    commands = re.sub("^lamkernels ", f"{sys.executable} -m lamkernels.cli ", commands, flags=re.MULTILINE)
    (tmp_path / "my_lam.py").write_text(module)
    (tmp_path / "call.py").write_text(call)
    (tmp_path / "data").mkdir()
    for name in "abc":
        np.save(tmp_path / "data" / f"{name}.npy", np.random.default_rng(0).standard_normal((300, 64), np.float32))
    save_file({"weight": torch.randn(128, 128) / 11, "codebook": torch.randn(16, 32)}, tmp_path / "lam.safetensors")
    printed = subprocess.run(
        ["bash", "-ec", f"{sys.executable} call.py; mv labels called; {commands}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.startswith("897 0\n")
    tables = [parquet.read_table(tmp_path / folder) for folder in ("called", "labels", "labels-2")]
    columns = [{name: table[name].to_pylist() for name in table.column_names[1:]} for table in tables]
    assert columns[0] == columns[1] == columns[2] and len(columns[0]["t"]) == 897
    assert [set(table["source"].to_pylist()) for table in tables] == [{f"data/{name}.npy" for name in "abc"}] * 3
