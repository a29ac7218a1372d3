"""Frames in front of a known background: the overlay is what it says, and so are the measures taken on it."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch.nn import functional as F

from lamkernels.lam import frame_experiments as experiments
from lamkernels.lam import frame_scenes
from lamkernels.lam.data import resize
from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.lam.flow import optical_flow
from lamkernels.lam.frame_lam import Latent
from lamkernels.lam.frame_metrics import (
    Latents,
    Probes,
    agent_innovation,
    controllability,
    few_label_accuracy,
    mutual_information,
    psnr,
)
from lamkernels.lam.frame_remedies import REMEDIES, SECOND_CAMERA
from lamkernels.lam.frame_scenes import GameData, Scene, TaskData
from lamkernels.lam.overlay import (
    AGENT,
    DIRECTION,
    FLOOR,
    OverlayConfig,
    agent_region,
    background,
    overlay,
    waves,
)

DIRECTIONS = torch.tensor(DIRECTION["pong"])[:, None]


def test_the_waves_are_orthogonal_and_of_one_grey_level():
    phi = waves(16, 6).flatten(1)
    torch.testing.assert_close(phi @ phi.mT / 256, torch.eye(6, dtype=torch.float64))


def test_the_overlay_is_its_state_behind_the_sprites_and_nothing_in_front(moving_square):
    data = overlay(moving_square, OverlayConfig(strength=3.0, views=True, seed=1))
    grey, behind = background(moving_square)
    for frames, state in ((data.frames, data.exogenous), (data.views, data.view_exogenous)):
        left = frames[:, 0].double() - (grey + FLOOR).clamp(max=255)
        expected = torch.einsum("tn,nhw->thw", state.double(), waves(32, 3))
        assert (left - expected)[behind].abs().max() <= 0.5 + 1e-4  # rounded once
        assert not left[~behind].any()
    assert not (behind & agent_region("pong", 32)).any()
    assert behind[0].double().mean() > 0.5
    assert not torch.equal(data.frames, data.views)


def test_the_state_is_a_process_that_starts_anew_with_each_episode(moving_square):
    data = overlay(moving_square, OverlayConfig(strength=2.0, spectrum=(1.0, 0.25), persistence=0.7))
    t = data.pairs
    torch.testing.assert_close(data.exogenous[t + 1], 0.7 * data.exogenous[t] + data.innovation[t])
    last = torch.cat([data.starts[1:], torch.tensor([True])])
    assert not data.innovation[last].any() and not data.actions[last].any()
    assert (data.actions[t].argmax(1) == moving_square.actions[t]).all()
    deviation = data.innovation[t].std(0)
    assert deviation[0] == pytest.approx(2.0, rel=0.15) and deviation[1] == pytest.approx(1.0, rel=0.15)
    spread = overlay(moving_square, OverlayConfig(persistence=0.9)).exogenous[data.starts]
    assert spread[:, 0].std() > 0  # starts are drawn, not zero


def test_one_seed_the_same_bytes(moving_square):
    config = OverlayConfig(views=True)
    first, again, other = (overlay(moving_square, c) for c in (config, config, replace(config, seed=1)))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("coupling", [0.0, 0.6, -1.0])
def test_the_noise_correlates_with_the_action_as_asked(moving_square, coupling):
    data = overlay(moving_square, OverlayConfig(strength=2.0, coupling=coupling))
    played = data.actions[data.pairs] @ DIRECTIONS
    found = torch.corrcoef(torch.cat([played.mT, data.innovation[data.pairs].mT]))[0, 1:]
    assert found[0] == pytest.approx(coupling, abs=1e-4 if abs(coupling) == 1 else 0.15)
    assert found[1:].abs().max() < 0.2


def test_every_game_has_a_place_for_its_player():
    for game in AGENT:
        region = agent_region(game, 32)
        assert 0 < region.double().mean() < 0.25
    assert agent_region("breakout", 32).any(1).nonzero().flatten().tolist() == [28, 29]


def make(**changes):
    frames, starts = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 0, 0, 1, 0, 0]).bool()
    fields = {"frames": frames, "actions": torch.zeros(6, 2), "starts": starts, "exogenous": torch.zeros(6, 3)}
    return ExogenousFrames(**{**fields, "innovation": torch.zeros(6, 3), **changes})


def test_pairs_do_not_cross_episodes():
    assert make().pairs.tolist() == make().ahead(1).tolist() == [0, 1, 3, 4]
    assert make().ahead(2).tolist() == [0, 3] and not len(make().ahead(7))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"frames": torch.zeros(6, 1, 8, 8)}, TypeError, "frames is torch.float32; it must be torch.uint8"),
        ({"actions": torch.zeros(5, 2)}, ValueError, "actions has 5 rows"),
        ({"innovation": torch.zeros(6, 2)}, ValueError, r"innovation has shape \(6, 2\); it must be that of exogenous"),
        ({"starts": torch.zeros(6).bool()}, ValueError, r"starts\[0\] is False"),
        ({"exogenous": torch.full((6, 3), math.nan)}, ValueError, "exogenous holds NaN"),
        ({"action_names": ("LEFT",)}, ValueError, "action_names has 1 names; actions has 2 columns"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


def test_the_probes_find_what_is_there_given_o_and_not_o_itself(moving_square):
    data = overlay(moving_square, OverlayConfig(strength=2.0, views=True))
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[4, ::2] = True  # a few pixels: there are few rows
    small = replace(
        data, frames=data.frames[:, :, ::4, ::4].contiguous(), views=data.views[:, :, ::4, ::4].contiguous()
    )
    t, split = data.pairs, 3 * len(data.pairs) // 4
    played, noise = data.actions[t] @ DIRECTIONS, data.innovation[t]
    place = small.frames[:, :, region].flatten(1) / 255
    state = data.exogenous[t, :1]

    def found(z, view=None, split=split):
        return Probes(small, DIRECTIONS, place, split, {"first": slice(1)})(Latents(z, view))

    agent = found(played + 3 * state, played)  # o may be added to z
    assert agent["recovery"] > 0.99 and abs(agent["leakage"]) < 0.1
    leaking = found(noise, noise.flip(0))
    assert leaking["leakage"] > 0.99 and leaking["recovery"] < 0.1
    one = found(noise[:, :1])
    assert one["leakage"] == pytest.approx(1 / 2.2, abs=0.15) and one["leakage_first"] > 0.99
    assert found(played, played, 30)["inconsistency"] < 0.2  # two regressions on few rows
    assert found(noise, noise.flip(0), 30)["inconsistency"] == pytest.approx(1.0, abs=0.3)


def test_the_probe_on_features_reads_an_action_whose_sign_depends_on_the_place():
    generator = torch.Generator().manual_seed(0)
    count = 2000
    frames = torch.randint(256, (count, 1, 8, 8), generator=generator).to(torch.uint8)
    played = torch.randint(3, (count,), generator=generator)
    starts = torch.arange(count) == 0
    state, noise = torch.randn(2, count, 2, generator=generator)
    data = ExogenousFrames(frames, F.one_hot(played, 3).float(), starts, state, noise)
    side = torch.where(frames[:, 0, 4, 4] > 127, 1.0, -1.0)
    z = ((data.actions @ DIRECTIONS) * side[:, None])[data.pairs]
    found = Probes(data, DIRECTIONS, frames[:, 0, 4, 4:5] / 255, 1500)(Latents(z))
    assert found["recovery"] < 0.1 < 0.5 < found["recovery_features"]
    assert max(found["leakage"], found["leakage_features"]) < 0.05


def test_mutual_information_of_known_tables():
    labels = torch.arange(4000) % 4
    assert mutual_information(labels * 7, labels) == pytest.approx(2.0, abs=0.01)
    assert mutual_information(torch.stack([labels % 2, labels // 2], 1), labels) == pytest.approx(2.0, abs=0.01)
    assert mutual_information(labels // 2, labels) == pytest.approx(1.0, abs=0.01)
    independent = torch.randint(4, (4000,), generator=torch.Generator().manual_seed(0))
    assert mutual_information(independent, labels) == pytest.approx(0.0, abs=2e-3)
    with pytest.raises(ValueError, match="one N"):
        mutual_information(labels, labels[1:])


def test_controllability_is_what_the_wrong_action_costs():
    generator = torch.Generator().manual_seed(0)
    frame, z = torch.rand(200, 1, 8, 8, generator=generator), torch.randn(200, 1, generator=generator)
    after = frame + 0.1 * z[:, :, None, None]
    assert psnr(frame + 0.1, frame) == pytest.approx(20.0, abs=1e-3)
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[:2] = True
    assert psnr(frame + 0.1 * region, frame, region) == pytest.approx(20.0, abs=1e-3)
    noise = 0.01 * torch.randn(frame.shape, generator=generator)

    def decode(o, latent):
        return o + 0.1 * latent[:, :, None, None]

    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    expected = psnr(decode(frame, z), after + noise) - psnr(decode(frame, z[order]), after + noise)
    found = controllability(decode, frame, after + noise, z)
    assert found == pytest.approx(expected) and found > 10
    assert controllability(lambda o, latent: o, frame, after, z) == 0


def test_few_labels_decode_what_z_says():
    labels = torch.arange(300) % 3
    z = F.one_hot(labels, 3).float()
    assert few_label_accuracy(z, labels, 200, 30) == 1.0
    assert few_label_accuracy(torch.zeros(300, 1), labels, 200, 30) == pytest.approx(1 / 3)


def test_the_agents_innovation_is_the_variance_of_where_it_goes():
    generator = torch.Generator().manual_seed(0)
    count = 4000
    place, jump = 4 + torch.randint(2, (count,), generator=generator), torch.randint(2, (count,), generator=generator)
    frames = torch.zeros(count, 2, 16, 16)
    rows = torch.arange(count)
    frames[rows, 0, 8, place] = 10.0
    frames[rows, 1, 8, place + 4 * jump] = 10.0
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[8] = True
    # given the place, two pixels that are 10 or 0 with probability 1/2: a variance of 25 each
    assert agent_innovation(frames, region) == pytest.approx(50.0, rel=0.02)
    assert agent_innovation(frames, ~region) == 0


@pytest.mark.parametrize("method", ["farneback", "dis"])
def test_the_flow_is_the_motion(method):
    if method == "dis":
        pytest.importorskip("cv2")
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")

    def blob(dx, dy):
        return 200 * (-((x - 22 - dx) ** 2 + (y - 24 - dy) ** 2) / 60).exp()

    moves = [(2.0, 0.0), (-1.5, 1.0), (0.0, 0.0), (5.0, -3.0)]
    flow = optical_flow(blob(0, 0).repeat(4, 1, 1), torch.stack([blob(*move) for move in moves]), method)
    found = flow[:, :, 20:28, 18:26].mean((2, 3))
    torch.testing.assert_close(found, torch.tensor(moves), atol=0.35, rtol=0.1)
    assert not flow[2].any() or flow[2].abs().max() < 1e-3
    with pytest.raises(ValueError, match="sides of at least"):
        optical_flow(torch.zeros(1, 4, 48), torch.zeros(1, 4, 48))


TINY = experiments.FrameControls(
    GameData("pong", size=16, ratio=(1.0, 4.0)), width=2, seeds=(0, 1), bottlenecks=("none", "vq"),
    training=experiments.TrainingConfig(steps=3, batch_size=16),
)  # fmt: skip


@pytest.fixture
def square_game(moving_square, monkeypatch):
    """The square is the player of the game that is played."""
    monkeypatch.setitem(AGENT, "pong", (12 / 32, 20 / 32, 0.0, 1.0))

    def load(config, folder=None):
        return replace(moving_square, frames=resize(moving_square.frames, config.size))

    monkeypatch.setattr(frame_scenes, "load_frames", load)


def test_the_command_writes_figures_and_resumes(square_game, tmp_path, monkeypatch):
    controls = {
        "noise": replace(TINY, bottlenecks=("none",)),
        "dependence": replace(TINY, data=replace(TINY.data, ratio=(4.0,), coupling=(0.0, 1.0)), bottlenecks=("none",)),
        "remedies": replace(TINY, data=replace(TINY.data, ratio=(4.0,)), remedies=REMEDIES, bottlenecks=("vq",)),
        "bottlenecks": replace(TINY, data=replace(TINY.data, ratio=(4.0,)), bottlenecks=("fsq",)),
    }
    monkeypatch.setattr(experiments, "CONTROLS", controls)
    assert experiments.main(["--processes", "1", "--out", str(tmp_path)]) == 0
    for name, own in controls.items():
        assert (tmp_path / f"frames-{name}.png").read_bytes().startswith(b"\x89PNG")
        header, *rows = (tmp_path / f"frames-{name}.csv").read_text().splitlines()
        assert header.startswith("ratio,coupling,remedy,bottleneck,seed,strength,agent_ratio,leakage,recovery")
        assert len(rows) == len(list(experiments.points(own)))
        known = json.loads((tmp_path / f"frames-{name}.json").read_text())
        assert tuple(known["data"]["ratio"]) == own.data.ratio and tuple(known["seeds"]) == own.seeds
    header, *changes = (tmp_path / "frames-remedies-effects.csv").read_text().splitlines()
    assert header.startswith("bottleneck,remedy,leakage,leakage_interval,") and len(changes) == len(REMEDIES) - 1
    assert not (tmp_path / "frames-noise-effects.csv").exists()
    journal, small = tmp_path / "rows.jsonl", replace(TINY, seeds=(0,), bottlenecks=("vq",))
    expected = experiments.rows_of(small, journal)
    monkeypatch.setattr(experiments.Runner, "run", lambda self, point: pytest.fail("made again"))
    assert experiments.rows_of(small, journal) == expected


def test_the_strength_is_the_ratio_asked_for(square_game):
    runner = experiments.Runner(TINY)
    low, high = (
        runner.scene(experiments.FramePoint((("ratio", ratio), ("coupling", 0.0)), "none", "none", 0))
        for ratio in (1.0, 4.0)
    )
    assert high.numbers["strength"] == pytest.approx(2 * low.numbers["strength"])
    assert high.numbers["agent_ratio"] == pytest.approx(4 * low.numbers["agent_ratio"])
    assert high.data.innovation[high.data.pairs, 0].std() == pytest.approx(high.numbers["strength"], rel=0.15)


class Brightness:
    """A model by hand: z is the brightness of o' in a region, and ô' is o with it there."""

    mean, scale = torch.zeros(1, 8, 8), 1.0

    def __init__(self, region):
        self.region = region

    def pixels(self, frames):
        return frames / 255

    def infer(self, frame, next_frame):
        z = next_frame[:, 0, self.region].mean(1, keepdim=True)
        return Latent(z, z, None, torch.zeros(()))

    def decode(self, frame, z):
        return torch.where(self.region, z[:, :, None, None], frame)


def test_a_latent_of_the_agent_is_worth_as_much_in_another_scene_and_one_of_the_background_nothing():
    generator = torch.Generator().manual_seed(0)
    count = 800
    turn = torch.randint(2, (count,), generator=generator)
    played, level = F.one_hot(turn, 2).float(), 100 + 60 * turn.roll(1)
    states = 100 + 100 * torch.rand(2, count, 1, generator=generator)
    agent = torch.zeros(8, 8, dtype=torch.bool)
    agent[5:7, ::2] = True
    frames, views = (
        torch.where(agent, level[:, None, None, None], state[:, :, None, None]).round().byte() for state in states
    )
    starts = torch.arange(count) == 0
    data = ExogenousFrames(
        frames, played, starts, states[0], torch.cat([states[0][1:], torch.zeros(1, 1)]), views, states[1]
    )
    place = frames[:, :, agent].flatten(1) / 255
    scene = Scene(data, agent, place, torch.tensor([[-1.0], [1.0]]), turn[data.pairs], {})
    of_agent, of_background = (experiments.measure(Brightness(region), scene) for region in (agent, ~agent))
    assert of_agent["recovery"] > 0.99 and abs(of_agent["leakage"]) < 0.05
    assert of_agent["inconsistency"] < 0.05  # two regressions on 200 rows
    assert of_agent["transfer_agent"] == pytest.approx(of_agent["delta_psnr_agent"]) and of_agent["delta_psnr"] > 1
    assert of_agent["few_label_accuracy"] == 1
    assert of_background["leakage"] > 0.99 and abs(of_background["recovery"]) < 0.05
    assert of_background["inconsistency"] == pytest.approx(1, abs=0.1) and of_background["delta_psnr"] > 1
    assert of_background["transfer_agent"] == 0 and of_background["few_label_accuracy"] == pytest.approx(0.5, abs=0.1)


def test_large_runs_are_the_same_code_on_any_device(square_game, tmp_path, monkeypatch, capsys):
    """That of a GPU, in small: its sizes are patched, ``--quick`` has few steps."""
    large = experiments.CONTROLS["control-remedies"].large()
    assert large.data.transitions == 50_000 and large.width == 32 and large.training.steps == 5000
    monkeypatch.setattr(frame_scenes, "LARGE_GAME", 20)
    monkeypatch.setattr(experiments, "LARGE_WIDTH", 4)
    monkeypatch.setattr(experiments, "CHUNK", 100)  # evaluation takes several
    small = replace(TINY, data=replace(TINY.data, ratio=(4.0,)), remedies=("none", "agent region"))
    controls = {"remedies": small}
    monkeypatch.setattr(experiments, "CONTROLS", controls)
    assert experiments.main(["--large", "--quick", "--device", "cpu", "--processes", "1", "--out", str(tmp_path)]) == 0
    _, *rows = (tmp_path / "frames-remedies.csv").read_text().splitlines()
    assert len(rows) == 2 * 5
    assert experiments.main(["--device", "tpu", "--out", str(tmp_path)]) == 1
    assert "--device is 'tpu'; it must be cpu or cuda[:N]" in capsys.readouterr().err


def test_where_nothing_can_be_rendered_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    arguments = ["control-remedies", "--quick", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(experiments.Runner, "run", lambda self, point: pytest.fail("work has begun"))

    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("no\nEGL")  # one that the import system does not take for a missing name

    broken = Broken("dm_control")
    broken.__spec__ = ModuleSpec("dm_control", None)
    for module, wanted in (
        (broken, "MuJoCo cannot render with MUJOCO_GL=egl: RuntimeError: no EGL; .*apt-get install libegl1"),
        (None, r"the experiments need dm_control; pip install 'lamkernels\[control\]'"),
    ):
        monkeypatch.setitem(sys.modules, "dm_control", module)
        monkeypatch.setenv("MUJOCO_GL", "egl")
        assert experiments.main(arguments) == 1
        said = capsys.readouterr().err
        assert re.search(f"frame_experiments: {wanted}", said) and said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_task_whose_transitions_show_their_action():
    pytest.importorskip("dm_control", reason="dm_control is not installed: pip install 'lamkernels[control]'")
    data = TaskData(transitions=120, size=16, detail=1)
    controls = replace(
        TINY, data=data, seeds=(0,), latent_dim=2, remedies=("none", "agent mask", "optical flow", SECOND_CAMERA)
    )
    runner = experiments.Runner(controls)
    try:
        scene = runner.scene(next(experiments.points(controls)))
    except RuntimeError as error:
        pytest.skip(str(error))
    pairs = scene.data.pairs
    moved = scene.place[pairs + 1, 0] - scene.place[pairs, 0]  # of the cart
    assert torch.corrcoef(torch.stack([scene.data.actions[pairs, 0], moved]))[0, 1] > 0.97
    assert set(scene.labels.tolist()) == {0, 1}
    covered = scene.data.masks.double().mean((1, 2)) / 255
    assert covered.mean() > 0 and covered.max() < 0.1 < scene.region.double().mean()
    rows = experiments.rows_of(controls)
    assert len(rows) == 9 and all(math.isfinite(row["leakage_background"]) for row in rows)
    assert ["psnr" in row for row in rows] == [True] + 2 * [True, False, True, False]
