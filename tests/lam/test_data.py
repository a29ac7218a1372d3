import logging
from dataclasses import replace

import pytest
import torch

from lamkernels.lam import DataConfig, data, files, load_frames

pytest.importorskip("ale_py")
SMALL = DataConfig(game="freeway", transitions=40, size=32, frame_skip=2)


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("frames", "actions", "starts"))


@pytest.mark.parametrize("game", data.GAMES)
def test_a_seed_decides_every_byte(game):
    config = DataConfig(game=game, transitions=30, size=32, seed=3)
    first, second = data.collect(config), data.collect(config)
    assert equal(first, second)
    assert len(first.pairs) == 30
    assert first.frames.shape[1:] == (3, 32, 32) and first.frames.dtype == torch.uint8
    assert (first.frames[first.pairs] != first.frames[first.pairs + 1]).any()
    other = data.collect(DataConfig(game=game, transitions=30, size=32, seed=4))
    assert not torch.equal(first.actions[first.pairs], other.actions[other.pairs])


def test_pairs_never_cross_an_episode(moving_square):
    pairs = moving_square.pairs
    assert not moving_square.starts[pairs + 1].any()
    assert len(pairs) == len(moving_square.starts) - int(moving_square.starts.sum())
    assert (moving_square.actions[pairs] >= 0).all()


def test_a_lost_life_ends_an_episode():
    frames = data.collect(DataConfig(game="breakout", transitions=200, size=16, frame_skip=8))
    assert int(frames.starts.sum()) > 1
    last = torch.cat([frames.starts[1:], torch.tensor([True])])
    assert (frames.actions[last] == -1).all() and (frames.actions[~last] >= 0).all()


def test_the_cache_returns_what_was_collected(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_CACHE", str(tmp_path))
    first = load_frames(SMALL)
    load_frames(replace(SMALL, mean_hold=3.0))  # has a file of its own
    monkeypatch.setattr(data, "collect", lambda *_, **__: pytest.fail("collected although the cache was sound"))
    assert equal(first, load_frames(SMALL))
    assert [path.suffix for path in tmp_path.iterdir()] == 2 * [".safetensors"]


def test_a_damaged_cache_is_collected_again(tmp_path, caplog):
    first = load_frames(SMALL, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert equal(first, load_frames(SMALL, folder=tmp_path))
    assert "checksum" in caplog.text
    path.write_bytes(content[:100])
    with caplog.at_level(logging.WARNING):
        assert equal(first, load_frames(SMALL, folder=tmp_path))
    assert "not a readable safetensors file" in caplog.text


def test_a_cache_of_something_else_is_collected_again(tmp_path, caplog):
    load_frames(SMALL, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    tensors, metadata = files.load_tensors(path)
    files.save_tensors(path, tensors, metadata | {"ale_py": "0.0"})
    with caplog.at_level(logging.WARNING):
        load_frames(SMALL, folder=tmp_path)
    assert "ale_py '0.0'" in caplog.text
    assert files.load_tensors(path)[1]["ale_py"] == metadata["ale_py"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    path = tmp_path / "folder" / "file"
    files.write_text(path, "before")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_and_wrong_options_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        files.load_tensors(tmp_path / "none")
    with pytest.raises(ValueError, match="game is 'chess'"):
        DataConfig(game="chess")
    with pytest.raises(ValueError, match="frame_skip is 0"):
        DataConfig(frame_skip=0)
