"""LeRobot data sets of both layouts: every frame beside its action, and damage costs the damaged file only."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from videos import write_video

from lamkernels.lam import lerobot
from lamkernels.lam.fit import FitConfig, file_stamps, fit
from lamkernels.lam.sources import Source, expanded

pytest.importorskip("av")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LENGTHS = (4, 7, 5)
CAMERAS = ("observation.images.top", "observation.images.wrist")


def grey(levels):
    """(T, 32, 48, 3) uint8: a frame of one grey level each."""
    return np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], (len(levels), 32, 48, 3))


def write_table(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def rows(episode):
    """What the Parquet files say of an episode; the first entry of an action is the grey level of the frame."""
    levels = [20 + 60 * episode + 8 * t for t in range(LENGTHS[episode])]
    return {
        "action": [[float(level), -1.0] for level in levels],
        "observation.state": [[float(level)] * 3 for level in levels],
        "episode_index": [episode] * len(levels),
        "frame_index": list(range(len(levels))),
    }


def levels_of(*episodes, camera=0):
    return [action[0] + camera for episode in episodes for action in rows(episode)["action"]]


def write_info(root, version, data_path):
    (root / "meta").mkdir(parents=True)
    features = {camera: {"dtype": "video"} for camera in CAMERAS} | {"action": {"dtype": "float32", "shape": [2]}}
    info = {"codebase_version": version, "fps": 10, "chunks_size": 2, "data_path": data_path, "features": features}
    (root / "meta" / "info.json").write_text(json.dumps(info))


def version_2(root):
    write_info(root, "v2.1", "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet")
    for episode in range(3):
        chunk = f"chunk-{episode // 2:03d}"
        write_table(root / "data" / chunk / f"episode_{episode:06d}.parquet", rows(episode))
        for number, camera in enumerate(CAMERAS):
            levels = levels_of(episode, camera=9 * number)
            write_video(root / "videos" / chunk / camera / f"episode_{episode:06d}.mp4", grey(levels))
    return root


def version_3(root):
    """Episode 0 and 2 in one video, 1 in another; all in one table, the last rows first."""
    write_info(root, "v3.0", "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")
    tables = [rows(episode) for episode in (2, 1, 0)]
    joined = {name: [value for table in tables for value in reversed(table[name])] for name in tables[0]}
    write_table(root / "data" / "chunk-000" / "file-000.parquet", joined)
    meta = {"episode_index": [0, 1, 2], "data/chunk_index": [0] * 3, "data/file_index": [0] * 3}
    for number, camera in enumerate(CAMERAS):
        meta[f"videos/{camera}/chunk_index"] = [0] * 3
        meta[f"videos/{camera}/file_index"] = [0, 1, 0]
        meta[f"videos/{camera}/from_timestamp"] = [0.0, 0.0, 0.1 * LENGTHS[0]]
        for file, episodes in enumerate([(0, 2), (1,)]):
            path = root / "videos" / camera / "chunk-000" / f"file-{file:03d}.mp4"
            write_video(path, grey(levels_of(*episodes, camera=9 * number)))
    write_table(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet", meta)
    return root


def read(source):
    frames, starts, actions, *_ = zip(*source.frames(), strict=True)
    return torch.cat(frames), torch.cat(starts), torch.cat(actions)


@pytest.mark.parametrize(("write", "order"), [(version_2, (0, 1, 2)), (version_3, (0, 2, 1))])
@pytest.mark.parametrize(("camera", "offset"), [(None, 0), ("wrist", 9)])
def test_every_frame_has_its_action(tmp_path, write, order, camera, offset):
    source = Source(write(tmp_path / "set"), side=16, camera=camera, batch_entries=3 * 3 * 16**2)
    frames, starts, actions = read(source)
    assert source.skipped == []
    expected = torch.tensor(levels_of(*order))
    assert torch.equal(actions, torch.stack([expected, torch.full_like(expected, -1)], 1).double())
    error = (frames.float().mean((1, 2, 3)) - expected - offset).abs().max()
    assert error < 4  # half of the step between two frames: what the codec loses does not hide a shift by one
    lengths = [LENGTHS[episode] for episode in order]
    assert starts.nonzero().flatten().tolist() == [0, lengths[0], lengths[0] + lengths[1]]


def test_damage_costs_the_damaged_video_only(tmp_path):
    root = version_2(tmp_path / "set")
    videos = sorted((root / "videos").rglob(f"{CAMERAS[0]}/*.mp4"))
    videos[0].write_bytes(videos[0].read_bytes()[:200])
    table = rows(1)
    short = {name: values[:-1] for name, values in table.items()}
    write_table(root / "data" / "chunk-000" / "episode_000001.parquet", short)
    source = Source(root, side=16)
    _, _, actions = read(source)
    assert actions[:, 0].tolist() == levels_of(2)
    assert [skipped.source for skipped in source.skipped] == [str(videos[0]), str(videos[1])]
    assert "it has 7 frames, and the Parquet files have 6 rows for it" in source.skipped[1].reason

    gap = {name: [*values[:2], *values[3:]] for name, values in rows(2).items()}
    write_table(root / "data" / "chunk-001" / "episode_000002.parquet", gap)
    assert list(source.frames()) == []
    assert "does not have the frames of episode 2 one after another" in source.skipped[2].reason


def test_the_fit_takes_videos_or_a_column(tmp_path):
    root = version_3(tmp_path / "set")
    found = fit(FitConfig(tuple(expanded(root)), 1, side=4), tmp_path / "videos")
    assert found["pairs"]["fitted"] == sum(LENGTHS) - 3 and found["actions"] is not None
    paths = tuple(expanded(root, rows="observation.state"))
    assert paths == (str(root / "data" / "chunk-000" / "file-000.parquet"),)
    config = FitConfig(paths, 1, rows="observation.state")
    assert fit(config, tmp_path / "columns")["pairs"]["fitted"] == sum(LENGTHS) - 3


def test_changed_actions_are_noticed_and_names_are_not_passed_over(tmp_path):
    root = version_2(tmp_path / "set")
    before = file_stamps(expanded(root))
    write_table(root / "data" / "chunk-000" / "episode_000001.parquet", rows(1) | {"more": [0] * LENGTHS[1]})
    assert file_stamps(expanded(root)) != before
    source = Source(root, side=16, actions="actoin")
    assert list(source.frames()) == [] and "has no column actoin" in source.skipped[0].reason
    assert expanded([root, expanded(root)[0]]) == expanded(root)


def test_messages(tmp_path):
    root = version_2(tmp_path / "set")
    with pytest.raises(ValueError, match=r"has the cameras observation\.images\.top, .*wrist, and not left"):
        Source(root, camera="left")
    (root / "meta" / "info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not that of a LeRobot data set: KeyError"):
        lerobot.files(root)
