"""The same bytes after a kill, from any number of processes; what is damaged or of another run is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from label_cases import CODEBOOK, DIM, SLOTS, STARTS, D, K, encoder, expected, features, files, labels_of, parquet, read
from safetensors import safe_open
from torch import nn

import lamkernels as lk
from lamkernels.cli import main
from lamkernels.labelling import read_pairs, run, shards
from lamkernels.lam import Source


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, arguments, format):
    arguments = [*arguments, "--format", format, "--vectors", "--batch-size", "10", "--encoder-option", "wait=0.02"]
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, "-m", "lamkernels.cli", *arguments, "--out", str(killed)]
    for goal in (2, 6) if format == "parquet" else (4,):
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
        ({"encoder": lambda o, n: encoder(o, n)}, "its encoder was 'label_cases:encoder'"),
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
