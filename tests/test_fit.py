from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import write_video

from lamkernels.cli import main
from lamkernels.lam.files import load_tensors
from lamkernels.lam.fit import FitConfig, fit
from lamkernels.lam.linear import LinearLAM

ROWS, DIM, ACTIONS = 1300, 5, 3


def episode(path: Path, seed: int, rows: int = ROWS, dim: int = DIM) -> Path:
    """A random walk that integer actions push along fixed directions, with a start in the middle."""
    generator = np.random.default_rng(seed)
    directions = np.random.default_rng(9).normal(size=(ACTIONS, dim))
    actions = generator.integers(ACTIONS, size=rows)
    steps = directions[actions] + 0.1 * generator.normal(size=(rows, dim))
    starts = np.zeros(rows, bool)
    starts[[0, rows // 2]] = True
    features = np.cumsum(np.vstack([np.zeros(dim), steps[:-1]]), 0) * 0.01
    np.savez(path, features=features.astype(np.float32), actions=actions, starts=starts)
    return path


def pairs(paths: list[Path]) -> tuple[torch.Tensor, ...]:
    """o, o' and actions of the pairs that are fitted on."""
    found = []
    for index, path in enumerate(paths):
        data = np.load(path)
        for t in range(len(data["features"]) - 1):
            segment = t // 256
            if not data["starts"][t + 1] and (t + 1) // 256 == segment and (segment + index) % 5 != 4:
                found.append((data["features"][t], data["features"][t + 1], data["actions"][t]))
    o, o_next, a = zip(*found, strict=True)
    one_hot = torch.nn.functional.one_hot(torch.tensor(np.array(a)), 4)
    return torch.tensor(np.array(o)), torch.tensor(np.array(o_next)), one_hot.float()


def left_of(target: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """What a regression on ``given`` and a constant leaves."""
    known = torch.cat([given, torch.ones(len(given), 1).to(given)], 1)
    return target - known @ torch.linalg.lstsq(known, target, driver="gelsd").solution


def config(*paths: Path, **options: object) -> FitConfig:
    return FitConfig(tuple(map(str, paths)), 2, num_actions=4, **options)  # type: ignore[arg-type]


def test_the_fit_is_that_of_the_pairs(tmp_path):
    paths = [episode(tmp_path / f"{i}.npz", i) for i in range(2)]
    results = fit(config(*paths, action_weight=0.5), tmp_path / "out")
    o, o_next, a = pairs(paths)
    expected = LinearLAM(2, action_weight=0.5, rtol=1e-5).fit(o, o_next, a=a)
    found = LinearLAM(2)
    found.load_state_dict(load_tensors(tmp_path / "out" / "model.safetensors")[0])
    assert results["pairs"]["fitted"] == len(o)
    n = len(o) / (len(o) - 1)  # the accumulator divides by n − 1
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues * n, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found.encode(o, o_next) * n**0.5, expected.encode(o, o_next), rtol=1e-3, atol=1e-4)
    assert results["actions"]["recovery"] > 0.9 and results["actions"]["held_out"] > 0.9
    z, played = (left_of(t.double(), o.double()) for t in (found.encode(o, o_next), a))
    unexplained = left_of(z, played).square().sum() / z.square().sum()  # of z by the action, given o
    assert results["actions"]["unexplained_latent"] == pytest.approx(float(unexplained), abs=1e-3)
    assert results["loss"]["held_out"] == pytest.approx(results["loss"]["fit"], rel=0.3)
    optimal = results["loss"]["optimal"] * (1 - 1e-12)  # two sums that may round apart where the fit is the optimum
    assert optimal <= results["loss"]["fit"] < results["loss"]["without_latent"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["loss"] == results["loss"]
    assert (tmp_path / "out" / "spectrum.png").read_bytes()[:4] == b"\x89PNG"


def test_a_killed_fit_resumes_to_the_same_bits(tmp_path):
    paths = [str(episode(tmp_path / f"{i}.npz", i, 4000)) for i in range(12)]
    slow = "import time, lamkernels.lam.sources as s; read = s._as_rows; "
    slow += "s._as_rows = lambda rows: (time.sleep(0.2), read(rows))[1]; "
    arguments = [*paths, "--latent-dim", "2", "--num-actions", "4", "--checkpoint-seconds", "0"]
    script = (
        f"{slow}from lamkernels.cli import main; main(['fit', *{arguments!r}, '--out', {str(tmp_path / 'killed')!r}])"
    )
    checkpoint = tmp_path / "killed" / "checkpoint-0-of-1.safetensors"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.exists() or json.loads(load_tensors(checkpoint)[1]["progress"])["source"] < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "report.json").exists()
    assert json.loads(load_tensors(checkpoint)[1]["progress"])["rows"] < 12 * 4000
    assert main(["fit", *arguments, "--out", str(tmp_path / "killed")]) == 0
    assert main(["fit", *arguments, "--out", str(tmp_path / "undisturbed")]) == 0
    for name in ("model.safetensors", "moments.safetensors", "spectrum.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@pytest.mark.parametrize("files", [1, 4], ids=["shared by segments", "shared by files"])
def test_two_processes_fit_what_one_does(tmp_path, files):
    paths = [str(episode(tmp_path / f"{i}.npz", i)) for i in range(files)]
    arguments = ["fit", *paths, "--latent-dim", "2", "--num-actions", "4", "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, "-m", "lamkernels.cli", *arguments, str(tmp_path / "two")],
        check=True,
        capture_output=True,
        timeout=120,
    )
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert one["pairs"] == two["pairs"]
    models = [load_tensors(tmp_path / name / "model.safetensors")[0] for name in ("one", "two")]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-5, atol=1e-7 * float(tensor.abs().max()))
    assert one["loss"]["fit"] == pytest.approx(two["loss"]["fit"], rel=1e-6)


def test_what_does_not_fit_is_reported_and_skipped(tmp_path, capsys):
    good = episode(tmp_path / "a.npz", 0)
    (tmp_path / "broken.npz").write_bytes(good.read_bytes()[:1000])
    np.savez(tmp_path / "c.npz", features=np.zeros((300, 7), np.float32), actions=np.zeros(300, int))
    np.save(tmp_path / "d.npy", np.zeros((300, DIM), np.float32))
    assert main(["fit", str(tmp_path), "--num-actions", "4", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for name, reason in (("broken.npz", "skipped"), ("c.npz", "7 entries"), ("d.npy", "no actions")):
        assert any(name in line and reason in line for line in printed.splitlines()), (name, printed)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(found["skipped"]) == 3 and found["pairs"]["fitted"] == len(pairs([good])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.npz"], "there is no file or folder absent.npz"),
        (["{good}", "--latent-dim", "0"], "latent_dim is 0"),
        (["{good}", "--rtol", "1"], "rtol is 1.0"),
        (["{good}", "--action-weight", "-1"], "action_weight is -1.0"),
        (["{good}", "--num-actions", "2"], "an action is 2; integer actions must be in [-1, 1]"),
        (["{plain}", "--action-weight", "1"], "has no actions"),
        (["{good}", "--rows", "pixels"], "no rows could be read"),
        (["{good}", "--actions", "moves"], "but not moves for the actions"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path, capsys, arguments, message):
    np.save(tmp_path / "plain.npy", np.zeros((30, DIM), np.float32))
    places = {"good": episode(tmp_path / "good.npz", 0), "plain": tmp_path / "plain.npy"}
    arguments = [argument.format(**places) for argument in arguments]
    try:
        status = main(["fit", *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        status = stop.code
    assert status and message in capsys.readouterr().err


def test_a_checkpoint_of_another_fit_is_refused(tmp_path, capsys):
    path, out = episode(tmp_path / "a.npz", 0), str(tmp_path / "out")
    assert main(["fit", str(path), "--num-actions", "4", "--out", out]) == 0
    assert main(["fit", str(path), "--num-actions", "5", "--out", out]) == 1
    assert "another fit" in capsys.readouterr().err
    episode(path, 1)
    assert main(["fit", str(path), "--num-actions", "4", "--out", out]) == 1
    assert main(["fit", str(path), "--num-actions", "4", "--out", out, "--restart"]) == 0


def test_frames_get_a_picture_of_each_dimension(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (600, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "frames.npz", frames=frames)
    results = fit(FitConfig((str(tmp_path / "frames.npz"),), 3, side=4), tmp_path / "out")
    assert (tmp_path / "out" / "effects.png").read_bytes()[:4] == b"\x89PNG"
    assert results["actions"] is None


def test_a_video_is_fitted(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (300, 16, 16, 3), np.uint8)
    write_video(tmp_path / "a.mp4", frames)
    results = fit(FitConfig((str(tmp_path / "a.mp4"),), 3, side=8), tmp_path / "out")
    assert results["pairs"]["fitted"] == 255 + 43  # two segments of 256 frames and 44
    assert 0 < results["loss"]["fit"] < results["loss"]["without_latent"]
    assert (tmp_path / "out" / "effects.png").read_bytes()[:4] == b"\x89PNG"
