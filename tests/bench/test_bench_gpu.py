"""The one command for a GPU machine: short scripts as parts; the real commands stop at the missing GPU."""

import json
import os
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from lamkernels.bench import cli, gpu, small_cases, warm
from lamkernels.bench.gpu import Part
from lamkernels.bench.providers import PROVIDERS
from lamkernels.bench.workloads import CODE_OPS, Workload
from torch.utils._python_dispatch import TorchDispatchMode

from lamkernels import info

COUNTED = (
    "import pathlib; path = pathlib.Path({0!r}); path.write_text(path.read_text() + 'x' if path.exists() else 'x'); {1}"
)
SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what there is", flush=True)
    {0}
"""


def script(name, code, seconds=20.0, **more):
    return Part(name, seconds, (sys.executable, "-c", code), **more)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_parts_fail_time_out_and_resume_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 4.0)  # a busy machine takes its time to end a process
    runs = {name: tmp_path / f"{name}.runs" for name in ("right", "wrong")}
    counted = {name: COUNTED.format(str(path), "{}") for name, path in runs.items()}
    chosen = [
        script("right", counted["right"].format("print('all', 'right')")),
        script("wrong", counted["wrong"].format("raise SystemExit('it broke')")),
        script("polite", SLOW.format("raise SystemExit(0)"), 2.5),
        script("stubborn", SLOW.format("time.sleep(60)"), 2.5),
        script("lacking", "", needs="no_such_tool"),
        script(
            "last", "import os; print(os.environ['LAMKERNELS_COMMIT'], os.environ['OWN'])", environment={"OWN": "2"}
        ),
    ]
    start = time.monotonic()
    states = gpu.run(chosen, tmp_path, 60, commit="abc123")
    assert time.monotonic() - start < 30
    assert states == {
        "right": "done", "wrong": "failed", "polite": "out of time", "stubborn": "out of time", "lacking": "absent",
        "last": "done",
    }  # fmt: skip
    records = {part.name: json.loads((tmp_path / part.name / "part.json").read_text()) for part in chosen}
    assert records["right"]["output"] == ["all right"] and records["wrong"]["output"][-1] == "it broke"
    assert records["polite"]["output"][-1] == "what there is" and records["last"]["output"] == ["abc123 2"]
    assert records["right"]["commit"] == "abc123" and records["right"]["command"].startswith("python -c ")
    for name in ("polite", "stubborn"):  # nothing of a part outlives it
        assert not alive(int(records[name]["output"][0].split()[1]))
    (tmp_path / "last" / "part.json").write_text("{")  # cut off
    again = gpu.run([chosen[0], chosen[1], chosen[5]], tmp_path, 60)
    assert again == {"right": "done", "wrong": "failed", "last": "done"}
    assert (runs["right"].read_text(), runs["wrong"].read_text()) == ("x", "xx")
    assert gpu.run(chosen[:2], tmp_path, 0.0) == {"right": "done", "wrong": "not reached"}
    (tmp_path / "right" / "bench.json").write_text("{}")
    gpu.run(chosen[:1], tmp_path, 60, again=True)
    assert runs["right"].read_text() == "xx" and not (tmp_path / "right" / "bench.json").exists()


MEETING = """
import pathlib, time
here, there = (pathlib.Path({0!r}) / name for name in ({1!r}, {2!r}))
here.touch()
while not there.exists():
    time.sleep(0.02)
print("x" * 200_000)
"""


def test_parts_that_time_nothing_run_side_by_side_and_the_archive_keeps_all(tmp_path):
    out, archive = tmp_path / "a-gpu", tmp_path / "kept" / "results.tar.gz"
    left, right = (
        script(a, MEETING.format(str(tmp_path), f"{a}.here", f"{b}.here"), shares=True)
        for a, b in (("left", "right"), ("right", "left"))
    )
    held = f"import tarfile; print(*sorted(tarfile.open({str(archive)!r}).getnames()))"
    chosen = [script("first", "print(1)"), left, right, script("last", held)]
    assert gpu.longest(chosen) == 60
    assert set(gpu.run(chosen, out, 60, archive=archive).values()) == {"done"}
    packed = json.loads((out / "last" / "part.json").read_text())["output"][0].split()
    records = [name.removeprefix("a-gpu/") for name in packed if name.endswith(".json")]
    assert records == ["first/part.json", "left/part.json", "right/part.json"]
    with tarfile.open(archive) as tar:
        kept = tar.extractfile("a-gpu/last/part.json")
        assert kept is not None and json.load(kept)["state"] == "done"
        assert tar.getmember("a-gpu/right/output.txt").size == 200_001


def test_the_parts_fit_the_time_and_their_commands_reach_the_missing_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = gpu.parts(tmp_path)
    assert gpu.longest(chosen) <= 9 * 60 - gpu.GRACE
    package = gpu.__package__
    mains = {package: cli.main, f"{package}.small_cases": small_cases.main, f"{package}.warm": warm.main}
    for part in chosen:
        command = part.command[part.command.index(sys.executable) :]
        module, options = command[2], list(command[3:])
        if module == "pytest":
            assert "gpu" in options and (gpu.ROOT / options[-1]).is_dir()
            continue
        try:
            status = mains[module](options)
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert status == 2 and "no CUDA or ROCm device" in error and error.count("\n") == 1, part.name
    assert gpu.main([]) == 2
    assert "finds none here; --list shows what would run" in capsys.readouterr().err
    assert gpu.main(["--list", "--parts", "tests,memcheck"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["tests", "memcheck"] and os.fspath(tmp_path) not in listed[0]
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "tests,speed"])
    assert "no part speed; there are warm, tests, memcheck" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--archive", str(tmp_path / "all.tar.gz")])
    assert "cannot lie in the folder that it packs" in capsys.readouterr().err


def test_what_is_warmed_up_is_what_is_measured(monkeypatch):
    shown = {task.workload for task in warm.tasks("cpu") if task.workload}
    assert {w.op for w in shown} == set(CODE_OPS) and {w.suite for w in shown} == {"lam", "tokenizer"}
    assert all(w.score_matrix_bytes <= warm.SCORES for w in shown)
    step = Workload("custom", "train_step", 20, 3, 4)
    assert warm.compile_one(warm.Task("eager", step), "cpu") == ""
    assert warm.compile_one(warm.Task("faiss", step), "cpu").startswith("KeyError")

    monkeypatch.setattr(type(PROVIDERS["cuda"]), "absent", lambda self, device: "")
    ours = [task.workload for task in warm.tasks("cuda") if task.what == "cuda"]
    assert any(w.K == 65536 for w in ours) and not any(w.dtype == "float32" and w.K == 1024 for w in ours)


@pytest.mark.parametrize(
    "text",
    [
        "Synchronization debug mode is a prototype feature and does not",
        "Please use the new API settings to control TF32 behavior, such as",
    ],
)
def test_what_torch_says_of_itself_on_a_gpu_fails_no_test(text):
    warnings.warn(text, UserWarning, stacklevel=1)  # an error by pyproject.toml where it is not excepted


def test_the_small_cases_reach_every_operator(capsys, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", "reference")  # nothing to compile
    called = set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.name().removeprefix("lamkernels::"))
            return func(*args, **(kwargs or {}))

    with Note():
        assert small_cases.main(["--device", "cpu"]) == 0
    assert set(info.operators()) <= called
    assert {"vector_quantize_backward", "lookup_free_quantize_backward", "finite_scalar_quantize_backward"} <= called
    assert "every case is finite" in capsys.readouterr().out
