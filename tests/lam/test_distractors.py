"""The distractors' ranges, dynamics and geometry on arrays; frames of dm_control where it can render."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from videos import write_video

from lamkernels.lam import distractors
from lamkernels.lam.control import ControlConfig, collect
from lamkernels.lam.distractors import CameraState


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_levels_are_the_published_ones():
    assert {level: (distractors.SCALES[level], distractors.VIDEOS[level]) for level in distractors.SCALES} == {
        "easy": (0.1, 4), "medium": (0.2, 8), "hard": (0.3, 60)
    }  # fmt: skip


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_walks_stay_in_their_range_and_move_as_published(scale):
    colours = distractors.colour_walk(40, 400, scale, generator(), dynamic=True)
    assert colours.abs().max() == scale and colours[0].abs().max() > 0.9 * scale
    inside = (colours[1:].abs() < scale) & (colours[:-1].abs() < scale)
    assert float((colours[1:] - colours[:-1])[inside].std()) == pytest.approx(0.03 * scale, rel=0.03)
    still = distractors.colour_walk(40, 5, scale, generator(), dynamic=False)
    assert torch.equal(still, colours[:1].expand(5, -1, -1))

    walks = [distractors.camera_walk(150, scale, generator(seed), dynamic=True, above=True) for seed in range(100)]
    walk = torch.stack(walks)
    quarter = scale * math.pi / 2
    for entry, (low, high) in enumerate([(-quarter, quarter), (0, quarter), (-0.5 * scale, 1.5 * scale)]):
        reached = walk[:, 0, entry].min(), walk[:, 0, entry].max(), walk[..., entry].min(), walk[..., entry].max()
        assert low <= reached[2] <= reached[0] < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < reached[1] <= reached[3] <= high
    assert walk[..., 4:].abs().max() <= scale * math.pi / 50
    moved, velocity = walk[:, 1:, :4] - walk[:, :-1, :4], walk[:, 1:, 4:]
    free = (moved - velocity).abs() < 1e-12  # the others met the end of their range
    assert 0.8 < free.double().mean() < 1 and bool((moved * velocity)[~free].le(1e-12).all())
    still = distractors.camera_walk(3, scale, generator(), dynamic=False, above=True)
    assert torch.equal(still, torch.cat([walks[0][:1, :4], torch.zeros(1, 4)], 1).expand(3, -1))


def test_innovations_are_what_the_state_gains():
    walk, starts = torch.randn(6, 3, dtype=torch.float64), torch.tensor([True, False, False, True, False, False])
    found = distractors.innovations(walk, starts)
    assert torch.equal(found[[0, 1, 3, 4]], walk[[1, 2, 4, 5]] - walk[[0, 1, 3, 4]])
    assert not found[[2, 5]].any()


def test_a_camera_turns_around_what_it_looks_at():
    backwards = torch.tensor([0.0, -1.0, 0.5], dtype=torch.float64)
    backwards /= backwards.norm()
    right = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    rotation = torch.stack([right, torch.linalg.cross(backwards, right), backwards], 1)
    position = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    target = position - 2.5 * backwards
    same = distractors.orbit(position, rotation, 2.5, CameraState(0, 0, 0, 0))
    torch.testing.assert_close(same, (position, rotation))
    moved, turned = distractors.orbit(position, rotation, 2.5, CameraState(0.4, 0.2, 0.5, 0.3))
    torch.testing.assert_close(turned.mT @ turned, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(moved - 3.75 * turned[:, 2], target)  # farther away, and still in the middle
    height = [math.asin(float(axes[2, 2])) for axes in (rotation, turned)]
    assert height[1] - height[0] == pytest.approx(0.2)  # seen from higher up
    heading = [math.atan2(float(axes[1, 2]), float(axes[0, 2])) for axes in (rotation, turned)]
    assert heading[1] - heading[0] == pytest.approx(0.4)
    _, upright = distractors.orbit(position, rotation, 2.5, CameraState(0.4, 0.2, 0.5, 0))
    torch.testing.assert_close(turned[:, 0], math.cos(0.3) * upright[:, 0] + math.sin(0.3) * upright[:, 1])


def test_backgrounds_play_there_and_back(tmp_path):
    video = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    played = distractors.background_walk([video], 20, generator(3), dynamic=True)[:, 0, 0, 0].int()
    assert (played[1:] - played[:-1]).abs().eq(1).all() and played.min() == 0 and played.max() == 4
    still = distractors.background_walk([video], 4, generator(3), dynamic=False)[:, 0, 0, 0].int()
    assert torch.equal(still, played[:1].expand(4))
    first, second = (distractors.synthetic_video(16, seed) for seed in (1, 2))
    assert torch.equal(first, distractors.synthetic_video(16, 1)) and not torch.equal(first, second)
    moved = (first[1:].float() - first[:-1].float()).abs().mean((1, 2, 3))
    assert moved.min() > 5 and moved.max() < 60  # it moves, and by less than between two videos
    state = distractors.background_state(first)
    torch.testing.assert_close(state[:, 5], first[:, :, 4:8, 4:8].double().mean((1, 2, 3)) / 255)

    np.save(tmp_path / "a.npy", first[:7].numpy())
    (tmp_path / "broken.npy").write_bytes(b"no such thing")
    (folder,) = distractors.background_videos(16, 4, 0, tmp_path)
    assert torch.equal(folder, first[:7])
    write_video(tmp_path / "b.mp4", first[:5].movedim(1, 3).numpy())
    _, film = distractors.background_videos(16, 4, 0, tmp_path)
    assert film.shape == (5, 3, 16, 16) and (film.float() - first[:5].float()).abs().mean() < 20  # what a codec loses
    assert len(distractors.background_videos(16, 4, 0)) == 4


def test_what_is_opaque_hides_the_background():
    picture, background = (torch.full((3, 2, 2), level, dtype=torch.uint8) for level in (200, 100))
    found = distractors.composed(picture, background, torch.tensor([[1.0, 0.0], [0.3, 0.5]]))
    assert torch.equal(found, torch.tensor([[200, 100], [130, 150]], dtype=torch.uint8).expand(3, -1, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difficulty": "extreme"}, "difficulty is 'extreme'; it must be one of 'easy', 'medium', 'hard'"),
        ({"distractors": ("noise",)}, "distractors is 'noise'"),
        ({"transitions": 0}, "transitions is 0"),
        ({"mean_hold": 0.5}, "mean_hold is 0.5"),
        ({"view_kind": "all"}, "view_kind is 'all'; it must be one of 'camera', 'scene', 'both'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ControlConfig(**options)


SMALL = {"transitions": 5, "episode": 3, "size": 32, "difficulty": "hard"}


def rendered(**options):
    pytest.importorskip("dm_control", reason="dm_control is not installed: pip install 'lamkernels[control]'")
    try:
        return collect(ControlConfig(**(SMALL | options)))
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_task_behind_distractors():
    plain, all_of_them = rendered(distractors=()), rendered(views=True)
    assert plain.frames.shape == (7, 3, 32, 32) and plain.exogenous.shape == (7, 0)
    assert all_of_them.starts.tolist() == [True, False, False, False, True, False, False]
    assert torch.equal(all_of_them.actions, plain.actions)  # the agent does the same in front of each
    assert not torch.equal(all_of_them.frames, all_of_them.views)
    materials = all_of_them.exogenous.shape[1] - 16 - 8
    assert materials > 0 and materials % 3 == 0
    colours = slice(16, 16 + materials)
    assert torch.equal(all_of_them.exogenous[:, colours], all_of_them.view_exogenous[:, colours])
    assert not torch.equal(all_of_them.exogenous[:, :16], all_of_them.view_exogenous[:, :16])
    again = rendered(views=True)
    assert again.fingerprint() == all_of_them.fingerprint()

    scenes = rendered(views=True, view_kind="scene")
    assert not (scenes.exogenous == scenes.view_exogenous)[scenes.starts, : colours.stop].any()
    assert torch.equal(scenes.places, plain.places) and plain.places.shape[1] % 3 == 0
    moved = plain.masks.float().mean((1, 2))
    assert moved.min() > 0 and moved.max() < 255 * 0.3
    behind = (scenes.masks[0] == 0) & (plain.masks[0] == 0)
    assert (scenes.frames[0] != plain.frames[0]).any(0)[behind].double().mean() > 0.5


def test_another_camera_turns_around_the_agent():
    same, turned = (rendered(distractors=(), views=True, view_kind="both", side=side) for side in (0.0, 0.8))
    for data in (same, turned):
        assert torch.equal(data.views, data.frames)  # no distractor is another
    assert torch.equal(same.second_views, same.frames)
    assert (turned.second_views.float() - same.frames.float()).abs().amax((1, 2, 3)).min() > 20


def test_each_distractor_changes_what_it_should(tmp_path):
    plain = rendered(distractors=()).frames.float()
    for kind, width in (("background", 16), ("camera", 8)):
        found = rendered(distractors=(kind,))
        assert found.exogenous.shape[1] == width
        assert (found.frames.float() - plain).abs().amax((1, 2, 3)).min() > 20
    colour = torch.tensor([10, 200, 90], dtype=torch.uint8)[:, None, None]
    np.save(tmp_path / "video.npy", colour.expand(4, 3, 40, 40).numpy())
    found = rendered(distractors=("background",), videos=tmp_path).frames
    sky = (found == colour).all(1)
    assert 0.2 < sky.double().mean() < 0.9 and not (plain == colour).all(1).any()
    assert torch.equal(rendered(distractors=(), domain="walker", task="walk").starts, rendered().starts)
    with pytest.raises(ValueError, match="cartpole-fly is no task"):
        collect(ControlConfig(task="fly"))
