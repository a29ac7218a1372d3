"""Rows come out of every kind of file as they went in, in bounded memory; a damaged file costs itself only."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from videos import write_video

from lamkernels.covariance import Covariance
from lamkernels.lam import data, sources
from lamkernels.lam.sources import Source

X = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
STARTS = np.arange(50) % 20 == 0
ACTIONS = np.arange(50) % 3
PACKAGES = {".parquet": "pyarrow", ".mp4": "av"}
READABLE = [s for s in (".npy", ".npz", ".safetensors", *PACKAGES) if find_spec(PACKAGES.get(s, "numpy"))]


def write(path, **arrays):
    """Writes ``arrays`` to ``path`` in the format of its suffix."""
    if path.suffix == ".npy":
        np.save(path, arrays["rows"])
    elif path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, path)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {name: array.tolist() for name, array in arrays.items()}
        parquet.write_table(pyarrow.table(columns), path, row_group_size=17)
    return path


def read(source):
    """All rows, starts and actions of a source."""
    rows, starts, actions, *_ = zip(*source, strict=True)
    return torch.cat(rows), torch.cat(starts), None if actions[0] is None else torch.cat(actions)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
@pytest.mark.parametrize("entries", [1, 42, 2**22])
def test_rows_episodes_and_actions(tmp_path, suffix, entries):
    path = write(tmp_path / f"a{suffix}", features=X, starts=STARTS, action=ACTIONS, other=X[:, :1])
    source = Source(path, batch_entries=entries)
    assert max(batch.rows.numel() for batch in source) <= max(entries, 6)
    for _ in range(2):
        rows, starts, actions = read(source)
        assert torch.equal(rows, torch.from_numpy(X)) and rows.dtype == torch.float32
        assert torch.equal(starts, torch.from_numpy(STARTS))
        assert torch.equal(actions, torch.from_numpy(ACTIONS))
    assert source.skipped == []


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
@pytest.mark.parametrize("entries", [1, 42, 2**22])
def test_the_columns_of_lerobot(tmp_path, suffix, entries):
    columns = {"observation.state": X, "action": X[:, :2], "episode_index": np.repeat([3, 4, 7], [1, 9, 40])}
    rows, starts, actions = read(Source(write(tmp_path / f"a{suffix}", **columns), batch_entries=entries))
    assert torch.equal(rows, torch.from_numpy(X)) and torch.equal(actions, torch.from_numpy(X[:, :2]))
    assert starts.nonzero().flatten().tolist() == [0, 1, 10]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
def test_pixels_and_names(tmp_path, suffix):
    frames = np.arange(4 * 2 * 3 * 3, dtype=np.uint8).reshape(4, 2, 3, 3)
    if suffix == ".parquet":  # whose lists of numbers have no uint8
        frames = frames / np.float32(255)
    path = write(tmp_path / f"a{suffix}", rows=frames)
    rows, starts, actions = read(Source(path))
    expected = torch.arange(4 * 18).view(4, 18) / 255
    torch.testing.assert_close(rows, expected)
    assert starts.tolist() == [True, False, False, False] and actions is None


def test_a_single_array_a_given_name_and_the_byte_order(tmp_path):
    single = write(tmp_path / "a.npz", anything=X.astype(">f8"))
    named = write(tmp_path / "b.safetensors", rows=X[:, :2], z=X, u=ACTIONS)
    rows, starts, _ = read(Source([single]))
    assert torch.equal(rows, torch.from_numpy(X)) and starts.sum() == 1
    rows, _, actions = read(Source(named, rows="z", actions="u"))
    assert torch.equal(rows, torch.from_numpy(X)) and torch.equal(actions, torch.from_numpy(ACTIONS))
    source = Source(write(tmp_path / "c.npz", z=X, u=X))
    assert list(source) == [] and "it holds z, u, but not rows or frames" in source.skipped[0].reason


def test_damaged_files_are_reported_and_the_others_read(tmp_path, caplog):
    good = [write(tmp_path / f"{name}.npy", rows=X) for name in ("b", "y")]
    for suffix in READABLE:
        (tmp_path / f"c{suffix}").write_bytes(b"no such thing" * 9)
        (tmp_path / f"d{suffix}").touch()
    (tmp_path / "e.npy").write_bytes(good[0].read_bytes()[:-100])
    np.save(tmp_path / "f.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "g.npy", np.zeros((3, 0), np.float32))
    write(tmp_path / "h.npz", rows=X, starts=STARTS[1:])
    write(tmp_path / "i.npy", rows=X[:, :5])
    write(tmp_path / "j.npy", rows=X.astype(np.complex64))
    (tmp_path / "notes.txt").write_text("not looked at")
    source = Source(tmp_path)
    with caplog.at_level(logging.WARNING):
        rows, starts, _ = read(source)
    assert torch.equal(rows, torch.from_numpy(np.concatenate([X, X])))
    assert starts.nonzero().flatten().tolist() == [0, 50]
    skipped = {entry.source.rpartition("/")[2]: entry.reason for entry in source.skipped}
    bad = [f"{name}{suffix}" for name in "cd" for suffix in READABLE]
    assert sorted(skipped) == sorted([*bad, "e.npy", "f.npy", "g.npy", "h.npz", "i.npy", "j.npy"])
    assert "its rows have 5 entries, those before have 6" in skipped["i.npy"]
    assert "(49,)" in skipped["h.npz"] and all(name in caplog.text for name in skipped)


def test_rows_before_the_damage_remain(tmp_path):
    np.savez(tmp_path / "a.npz", rows=X)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[700] ^= 255  # the checksum of the member fails at its end
    (tmp_path / "a.npz").write_bytes(content)
    write(tmp_path / "b.npy", rows=X)
    source = Source(tmp_path, batch_entries=60)
    rows, starts, _ = read(source)
    assert 50 <= len(rows) < 100 and "CRC" in source.skipped[0].reason
    assert torch.equal(rows[-50:], torch.from_numpy(X)) and starts[-50]


def test_parquet_refuses_what_is_no_matrix(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, column in {"ragged": [[1.0], [1.0, 2.0, 3.0]], "empty": [[1.0], None], "null": [1.0, None]}.items():
        parquet.write_table(pyarrow.table({"rows": column}), tmp_path / f"{name}.parquet")
    parquet.write_table(pyarrow.table({"rows": ["a", "b"]}), tmp_path / "text.parquet")
    source = Source(tmp_path)
    assert list(source) == []
    assert len(source.skipped) == 4


def test_videos_are_resized_and_flattened(tmp_path):
    path, levels = tmp_path / "a.mp4", np.arange(0, 250, 10, np.uint8)
    write_video(path, np.broadcast_to(levels[:, None, None, None], (25, 48, 64, 3)))
    source = Source(path, side=8, batch_entries=700)
    batches = list(source)
    assert [len(batch.rows) for batch in batches] == [3] * 8 + [1] and source.skipped == []
    rows = torch.cat([batch.rows for batch in batches])
    assert rows.shape == (25, 3 * 8 * 8)
    torch.testing.assert_close(rows.mean(1), torch.arange(0, 250, 10) / 255, atol=0.02, rtol=0)
    path.write_bytes(path.read_bytes()[:-2000])
    assert sum(len(batch.rows) for batch in Source(path, side=8)) < 25


def test_videos_that_decoders_end_without_a_word_are_reported(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
    for name in ("cut.avi", "hole.mkv", "GX01.MP4"):  # as a camera names it
        write_video(tmp_path / name, noise)
    content = (tmp_path / "cut.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 3])
    content = bytearray((tmp_path / "hole.mkv").read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    (tmp_path / "hole.mkv").write_bytes(content)
    source = Source(tmp_path, side=8)
    starts = {}
    for batch in source.frames():
        starts[Path(batch.source).name] = starts.get(Path(batch.source).name, []) + batch.starts.tolist()
    assert {name: sum(of_it) for name, of_it in starts.items()} == {"GX01.MP4": 1, "cut.avi": 1, "hole.mkv": 2}
    assert len(starts["GX01.MP4"]) == 40 and len(starts["cut.avi"]) < 25 and len(starts["hole.mkv"]) < 40
    reasons = {Path(skipped.source).name: skipped.reason for skipped in source.skipped}
    assert sorted(reasons) == ["cut.avi", "hole.mkv"]
    assert all(re.search(r"nothing could be read from .* to .* s; what could is taken", r) for r in reasons.values())


@pytest.mark.parametrize(("suffix", "package"), [(".mp4", "av"), (".parquet", "pyarrow.parquet")])
def test_a_missing_package_is_no_damage(tmp_path, monkeypatch, suffix, package):
    (tmp_path / f"a{suffix}").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"a\..* needs .*: pip install (av|pyarrow)"):
        list(Source(tmp_path))


def test_games_are_played_as_they_are_read(monkeypatch):
    pytest.importorskip("ale_py")
    config = data.DataConfig(game="freeway", transitions=150, size=8)  # the real one has 12 500 transitions
    frames, resized, resize = data.collect(config), [], data.resize
    monkeypatch.setattr(sources, "DataConfig", partial(data.DataConfig, transitions=150))
    monkeypatch.setattr(data, "resize", lambda part, size: (resized.append(len(part)), resize(part, size))[1])
    source = Source("atari:freeway", side=8, batch_entries=1000)
    assert len(next(iter(source)).rows) == 5 and resized == [data.RESIZE_BATCH]
    rows, starts, actions = read(source)
    assert torch.equal(rows, frames.frames.permute(0, 2, 3, 1).flatten(1) / 255)
    assert torch.equal(starts, frames.starts) and torch.equal(actions, frames.actions)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("last", [True, False])
def test_frames_that_are_too_large_are_resized(tmp_path, suffix, last):
    frames = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 12), np.uint8)
    areas = frames.reshape(5, 3, 4, 2, 4, 3).mean((3, 5)).round().astype(np.uint8)
    large, small = ((np.moveaxis(f, 1, 3) if last else f) for f in (frames, areas))
    path = write(tmp_path / f"a{suffix}", rows=large)
    rows, _, _ = read(Source(path, side=4, batch_entries=700))
    assert torch.equal(rows, torch.from_numpy(small.reshape(5, -1)) / 255)
    assert read(Source(path, side=12))[0].shape == (5, 3 * 8 * 12)


def test_an_accumulator_makes_the_pairs_of_all_files(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.npz", rows=X, starts=STARTS)
    cov = Covariance(6, lag=1)
    for batch in Source(tmp_path, batch_entries=50):
        cov.update(batch.rows, starts=batch.starts)
    assert cov.count == 2 * (50 - STARTS.sum())


MEMORY = """
import resource, sys, torch
from lamkernels.lam.sources import Source
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, batches = peak(), iter(Source(sys.argv[1], side=256, batch_entries=2**18))
print(sum(len(batch.rows) for batch in batches), peak() - before)
"""


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet", ".mp4"])
def test_a_file_is_never_in_memory_as_a_whole(tmp_path, suffix):
    path, count = tmp_path / f"a{suffix}", 2**19
    if suffix == ".mp4":  # 110 MiB of frames once they are resized
        count = 600
        write_video(path, np.zeros((count, 16, 16, 3), np.uint8))
    elif suffix == ".parquet":  # in one row group, of values that do not compress
        pyarrow = pytest.importorskip("pyarrow")
        values = pyarrow.array(np.random.default_rng(0).random(64 * count, np.float32))
        table = pyarrow.table({"rows": pyarrow.FixedSizeListArray.from_arrays(values, 64)})
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        write(path, rows=np.zeros((count, 64), np.float32))  # 128 MiB
    command = [sys.executable, "-c", MEMORY, str(path)]
    rows, extra = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert rows == count and extra < 2**26


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"paths": "nowhere.npy"}, FileNotFoundError, "there is no file or folder nowhere.npy"),
        ({"paths": __file__}, ValueError, "no known kind; these are .npy, .npz"),
        ({"paths": "atari:chess"}, ValueError, "game is 'chess'"),
        ({"paths": [], "side": 0}, ValueError, "side is 0"),
        ({"paths": [], "batch_entries": 1.5}, TypeError, "batch_entries is 1.5"),
    ],
)
def test_message(arguments, error, message):
    with pytest.raises(error, match=message):
        Source(**arguments)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no file of the kinds \.npy"):
        Source(tmp_path)
