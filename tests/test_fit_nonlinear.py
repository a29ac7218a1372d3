from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from browser import check_page

from lamkernels.cli import main
from lamkernels.lam import LAMConfig, LatentActionModel, frame_cache
from lamkernels.lam.files import load_tensors
from lamkernels.lam.fit_nonlinear import CHECKPOINT, NonlinearFitConfig, fit_nonlinear, split
from lamkernels.lam.fit_nonlinear_report import encode, measure
from lamkernels.lam.frame_cache import FramesConfig, cached_frames
from lamkernels.lam.train import TrainConfig, Trainer

for package in ("jinja2", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(package)

SIDE, FRAMES = 16, 260
SMALL = ["--side", str(SIDE), "--steps", "40", "--batch-size", "32", "--tokens", "2", "--codebook-size", "4"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_square(path, seed, actions=True, frames=FRAMES, side=SIDE):
    """A square that moves left, right or not at all."""
    generator = np.random.default_rng(seed)
    moves, place = generator.integers(3, size=frames), side // 2
    pixels = np.full((frames, side, side, 3), 40, np.uint8)
    for t in range(frames):
        pixels[t, 6:10, place : place + 4] = 220
        place = (place + 2 * (moves[t] - 1)) % (side - 4)
    known = {"actions": moves, "exogenous": generator.normal(size=frames)} if actions else {}  # the latter is not seen
    np.savez(path, frames=pixels, **known)
    return path


@pytest.fixture(scope="module")
def with_codes(tmp_path_factory):
    """The folder of a fit, and what it printed: squares with actions, and two files that are skipped."""
    folder, printed = tmp_path_factory.mktemp("codes"), io.StringIO()
    for seed in range(3):
        write_square(folder / f"{seed}.npz", seed)
    (folder / "broken.npz").write_bytes((folder / "0.npz").read_bytes()[:300])
    np.save(folder / "features.npy", np.zeros((20, 5), np.float32))
    arguments = [str(folder), *SMALL, "--steps", "250", "--learning-rate", "3e-3", "--num-actions", "3"]
    with contextlib.redirect_stdout(printed):
        assert main(["fit", "--model", "nonlinear", *arguments, "--out", str(folder / "out")]) == 0
    return folder / "out", printed.getvalue()


@pytest.fixture(scope="module")
def continuous(tmp_path_factory):
    """The folder of a fit with a Gaussian bottleneck, without actions."""
    folder = tmp_path_factory.mktemp("continuous")
    path = write_square(folder / "a.npz", 0, actions=False)
    arguments = [str(path), *SMALL, "--bottleneck", "gaussian", "--out", str(folder / "out")]
    assert main(["fit", "--model", "nonlinear", *arguments]) == 0
    return folder / "out"


def test_the_latent_actions_of_a_moving_square(with_codes):
    out, printed = with_codes
    assert "broken.npz" in printed and "features and vectors are for the linear model" in printed
    results = json.loads((out / "report.json").read_text())
    assert results["frames"] == 3 * FRAMES and len(results["skipped"]) == 2
    assert results["prediction"]["on"] == "held_out"
    inferred, another, copy = (results["prediction"][name] for name in ("under_inferred", "under_another", "copy"))
    assert inferred["error"] < 0.5 and copy["error"] == pytest.approx(1)
    assert another["error"] > inferred["error"] + 0.3  # of another pair, which in one of three cases moves alike
    assert inferred["psnr"] > copy["psnr"] + 3
    assert results["actions"]["held_out"] > 0.5 and results["actions"]["probe"]["accuracy"] > 0.8
    assert abs(results["exogenous"]["held_out"]) < 0.15 and "exogenous leakage: " in printed
    assert results["loss"]["last"] < 0.5 < results["loss"]["first"]
    tensors, metadata = load_tensors(out / "model.safetensors")
    model = LatentActionModel(LAMConfig(**json.loads(metadata["config"])))
    model.load_state_dict(tensors)


def test_continuous_latents_without_actions(continuous):
    results = json.loads((continuous / "report.json").read_text())
    assert results["codes"] is None and results["actions"] is None and results["exogenous"] is None
    assert "The data hold no actions" in (continuous / "report.html").read_text()


def test_the_pages_in_a_browser(with_codes, continuous, tmp_path):
    for folder, figures, said in ((with_codes[0], 6, "latent actions matter"), (continuous, 3, "direction")):
        page = (folder / "report.html").read_text()
        assert "{{" not in page and "{%" not in page and said in page
        check_page(folder / "report.html", figures, tmp_path)


def test_pairs_keep_their_lag_their_episode_and_their_side(tmp_path):
    starts = np.zeros(100, bool)
    starts[[0, 37]] = True
    frames = np.random.default_rng(0).integers(0, 256, (100, SIDE, SIDE), np.uint8)  # grey levels
    np.savez(tmp_path / "a.npz", frames=frames, starts=starts)
    cached = cached_frames(FramesConfig((str(tmp_path / "a.npz"),), side=SIDE, lag=3), tmp_path / "out")
    assert torch.equal(cached.data.frames, torch.from_numpy(frames)[:, None].expand(-1, 3, -1, -1))
    fitted, held_out, segment = split(cached)
    assert segment == 12
    held = [t // 12 % 5 == 4 for t in range(100)]
    within = [t for t in range(97) if not starts[t + 1 : t + 4].any()]
    assert fitted.tolist() == [t for t in within if not held[t] and not held[t + 3]]
    assert held_out.tolist() == [t for t in within if held[t] and held[t + 3]]


def test_the_cache_is_limited_checked_and_resumed(tmp_path, monkeypatch):
    paths = [str(write_square(tmp_path / f"{seed}.npz", seed, frames=40)) for seed in range(3)]
    whole = cached_frames(FramesConfig(tuple(paths), side=SIDE), tmp_path / "whole")
    frame = 3 * SIDE**2
    config = FramesConfig(tuple(paths), side=SIDE, cache_gib=50.5 * frame / 2**30)
    limited = cached_frames(config, tmp_path / "limited")
    assert torch.equal(limited.data.frames, whole.data.frames[:50])
    assert torch.equal(limited.data.actions, whole.data.actions[:50])
    assert [source for source, _ in limited.skipped] == paths[1:]
    assert "from frame 10 on: the cache is full: 50 frames" in limited.skipped[0][1]

    config = FramesConfig(tuple(paths), side=SIDE)
    save = frame_cache._save

    def stop_at_the_end(path, stamp, index):
        if index.done == len(paths):
            raise KeyboardInterrupt
        save(path, stamp, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(frame_cache, "_save", stop_at_the_end)
        cached_frames(config, tmp_path / "stopped", checkpoint_seconds=0)
    resumed = cached_frames(config, tmp_path / "stopped")
    assert torch.equal(resumed.data.frames, whole.data.frames) and resumed.parts == whole.parts
    assert torch.equal(resumed.action_rows, whole.action_rows)

    pixels = tmp_path / "whole" / "frames.u8"
    content = bytearray(pixels.read_bytes())
    content[50 * frame] ^= 255
    pixels.write_bytes(content)
    assert cached_frames(config, tmp_path / "whole").data.frames[50].equal(resumed.data.frames[50])
    write_square(paths[0], 7)
    with pytest.raises(ValueError, match="a source has changed since; --restart forgets it"):
        cached_frames(config, tmp_path / "whole")
    assert not torch.equal(cached_frames(config, tmp_path / "whole", restart=True).data.frames, resumed.data.frames)


def test_a_killed_fit_resumes_to_the_same_bits(tmp_path, capsys):
    path, out = write_square(tmp_path / "a.npz", 0), tmp_path / "killed"
    arguments = [
        "fit",
        "--model",
        "nonlinear",
        str(path),
        *SMALL,
        "--steps",
        "16",
        "--checkpoint-seconds",
        "0",
        "--out",
    ]
    slow = "import time, lamkernels.lam.train as t; step = t.Trainer.train_step; "
    slow += "t.Trainer.train_step = lambda self: (time.sleep(0.05), step(self))[1]; "
    script = f"{slow}from lamkernels.cli import main; main({[*arguments, str(out)]!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as here: the bits of convolutions depend on the threads
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / CHECKPOINT).exists() or int(load_tensors(out / CHECKPOINT)[1]["step"]) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert int(load_tensors(out / CHECKPOINT)[1]["step"]) < 16 and not (out / "report.json").exists()
    assert main([*arguments, str(out)]) == 0
    cached = cached_frames(FramesConfig((str(path),), side=SIDE), tmp_path / "undisturbed")
    model, training = LAMConfig(size=SIDE, tokens=2, codebook_size=4), TrainConfig(steps=16, batch_size=32)
    undisturbed = Trainer(model, cached.data, training, pairs=split(cached)[0])
    undisturbed.run(progress=False)
    killed, wanted = load_tensors(out / "model.safetensors")[0], undisturbed.model.state_dict()
    assert killed.keys() == wanted.keys() and all(torch.equal(killed[name], wanted[name]) for name in wanted)
    assert main([*arguments, str(out), "--seed", "1"]) == 1  # a checkpoint of another training
    assert "--restart forgets it" in capsys.readouterr().err


def test_frames_that_stand_still_do_not_blow_up_the_error(tmp_path):
    """One ratio over all pairs: in a batch of still ones the error of a copy is 0, and any error infinitely more."""
    frames = np.full((600, SIDE, SIDE, 3), 40, np.uint8)
    for t in range(300):
        frames[t, 6:10, t % 12 : t % 12 + 4] = 220
    np.savez(tmp_path / "a.npz", frames=frames)
    cached = cached_frames(FramesConfig((str(tmp_path / "a.npz"),), side=SIDE), tmp_path / "out")
    model = LatentActionModel(LAMConfig(size=SIDE, tokens=2, codebook_size=4)).eval()
    torch.nn.init.normal_(model.forward_model.last[0].weight, std=1e-3)
    sides = [encode(model, cached, pairs) for pairs in (cached.data.pairs[:10], cached.data.pairs)]
    prediction = measure(model, cached, *sides)["prediction"]
    assert prediction["copy"]["error"] == pytest.approx(1) and prediction["under_inferred"]["error"] < 3


def test_leakage_is_what_latents_say_of_the_next_state_beyond_frame_and_state(tmp_path):
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(1500, 2, generator=generator)
    state = torch.zeros(1500, 2)
    for t in range(1, 1500):
        state[t] = 0.9 * state[t - 1] + eps[t]
    state[700] = torch.nan  # not known there
    frames = torch.randint(256, (1500, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    for half, rows in enumerate((slice(0, 750), slice(750, None))):
        np.savez(tmp_path / f"{half}.npz", frames=frames[rows].numpy(), exogenous=1e3 * state[rows].numpy())
    cached = cached_frames(FramesConfig(tuple(str(tmp_path / f"{half}.npz") for half in (0, 1)), side=SIDE), tmp_path)
    torch.testing.assert_close(cached.exogenous, 1e3 * state, equal_nan=True)
    model = LatentActionModel(LAMConfig(size=SIDE, tokens=1, latent_dim=2, codebook_size=4)).eval()
    noise = torch.randn(1500, 2, generator=generator)
    for latents, low, high in ((eps, 0.99, 1.0), (eps + noise, 0.4, 0.6), (state.roll(1, 0).nan_to_num(), -0.1, 0.1)):
        sides = [
            encode(model, cached, pairs)._replace(latents=latents[pairs + 1][:, None]) for pairs in split(cached)[:2]
        ]
        assert low <= measure(model, cached, *sides)["exogenous"]["held_out"] <= high
    still, unknown = (dataclasses.replace(cached, exogenous=torch.full((1500, 2), value)) for value in (5.0, torch.nan))
    assert measure(model, still, *sides)["exogenous"] == {"leakage": 0, "held_out": 0}
    assert measure(model, unknown, *sides)["exogenous"] is None


def test_a_restart_forgets_at_once_and_other_data_are_refused(tmp_path, monkeypatch):
    path, out = write_square(tmp_path / "a.npz", 0), tmp_path / "out"
    training = TrainConfig(steps=3, batch_size=16)
    config = NonlinearFitConfig(FramesConfig((str(path),), side=SIDE), LAMConfig(size=SIDE, tokens=2), training)
    fit_nonlinear(config, out)
    write_square(path, 5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        fit_nonlinear(config, out, restart=True)
    assert not (out / CHECKPOINT).exists()
    (out / CHECKPOINT).write_bytes(b"")
    fit_nonlinear(config, out, restart=True)
    for name in ("frames.u8", "frames.safetensors"):
        (out / name).unlink()
    write_square(path, 6)  # read anew, and not what the checkpoint was trained on
    with pytest.raises(ValueError, match=r"data_name .*; --restart forgets it"):
        fit_nonlinear(config, out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.mp4"], "there is no file or folder absent.mp4"),
        (["{plain}"], "features and vectors are for the linear model"),
        (["{good}", "--side", "20"], "size is 20; it must be a multiple of 16"),
        (["{good}", "--lag", "0"], "lag is 0"),
        (["{good}", "--lag", "400"], "0 pairs of frames are in"),
        (["{good}", "--cache-gib", "0"], "cache_gib is 0"),
        (["{good}", "--device", "abacus"], "--device is 'abacus'"),
        (["{good}", "--action-weight", "1"], "unrecognized arguments: --action-weight"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path, capsys, arguments, message):
    np.save(tmp_path / "plain.npy", np.zeros((30, 5), np.float32))
    places = {"good": write_square(tmp_path / "good.npz", 0), "plain": tmp_path / "plain.npy"}
    arguments = [argument.format(**places) for argument in arguments]
    try:
        status = main(["fit", "--model", "nonlinear", *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as left:
        status = left.code
    assert status and message in capsys.readouterr().err


def test_a_configuration_that_contradicts_itself(tmp_path):
    with pytest.raises(ValueError, match="the model's size is 64, the side of the frames 32"):
        NonlinearFitConfig(FramesConfig(("a.npy",), side=32), LAMConfig(), TrainConfig())
