"""``python -m bench.gpu``: everything that a machine with a GPU can say, in one command of less than ten minutes.

Needs no network and no installation: the working directory is a checkout, and what is absent is a row or a part that
says so. Each part is a process with a time limit of its own; a part that is done is not run again, one that fails does
not keep the others from running.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lamkernels import info

from . import report
from .page import RESULTS

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0  # seconds in which a part that is out of time writes what it has
TAIL = 40  # lines of a part's output that its record keeps
PROVIDERS = "triton,cuda,harness,flash-kmeans,flashlib,eager,compile,vqp,vqp-compile"
ALONE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # of processes that share the cores
TOOLS = ("nvidia-smi", "nvcc", "compute-sanitizer", "cuobjdump")


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Attributes:
        name: of the part, and of its folder.
        seconds: after which it is interrupted; what it has written by then stays.
        command: what is run, in the root of the checkout.
        needs: an executable or a module without which it is absent.
        environment: variables of its own.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    needs: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def absent(self) -> str:
        """Why it cannot run here, or ""."""
        if not self.needs or shutil.which(self.needs) or importlib.util.find_spec(self.needs):
            return ""
        return f"{self.needs} is not installed"

    def shown(self) -> str:
        """The command as a reader would type it in the root of a checkout."""
        return shlex.join("python" if word == sys.executable else word for word in self.command)


def parts(out: Path) -> tuple[Part, ...]:
    """The parts, in the order of what is worth most if time runs out, writing to folders of ``out``."""
    package = __package__ or "bench"

    def suite(name: str, seconds: float, *options: str) -> Part:
        files = [f"--json={out / name / 'bench.json'}", f"--csv={out / name / 'bench.csv'}"]
        if importlib.util.find_spec("matplotlib") is not None:
            files.append(f"--plot={out / name / 'bench.png'}")
        fixed = ("--device=cuda", f"--providers={PROVIDERS}", "--rounds=2", "--seconds=0.15", "--timeout=60")
        return Part(name, seconds, (sys.executable, "-m", package, *options, *fixed, *files))

    def alone(name: str, seconds: float, option: str, more: str = "--quick") -> Part:
        command = (sys.executable, "-m", package, option, "--device=cuda", f"--json={out / name / 'bench.json'}")
        return Part(name, seconds, (*command, more))

    def sanitized(tool: str) -> Part:
        watch = ("compute-sanitizer", f"--tool={tool}", "--target-processes=application-only", "--error-exitcode=3")
        cases = (sys.executable, "-m", f"{package}.small_cases", "--device=cuda")
        return Part(tool, 27, (*watch, *cases), "compute-sanitizer", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    junit = f"--junitxml={out / 'tests' / 'junit.xml'}"
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2))  # most of their time is Triton's compiler
    several = ("-n", str(workers)) if importlib.util.find_spec("xdist") else ()
    tests = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *several, junit, "tests/gpu")
    return (
        Part("tests", 95, tests, "pytest", ALONE),
        Part("warm", 45, (sys.executable, "-m", f"{package}.warm", "--device=cuda"), "", ALONE),
        suite("train_step", 70, "--suite=lam,tokenizer", "--op=train_step"),
        suite("targets", 65, "--suite=targets", "--op=nearest_code,vector_quantize"),
        alone("tune", 30, "--tune"),
        suite("nearest_code", 40, "--suite=lam,tokenizer", "--op=nearest_code"),
        suite("vector_quantize", 30, "--suite=lam,tokenizer", "--op=vector_quantize,code_statistics"),
        suite("covariance", 45, "--suite=targets,moments", "--op=covariance"),
        suite("memory", 15, "--suite=memory"),
        alone("compat", 15, "--compat"),
        alone("lapa", 30, "--profile=lapa", "--seconds=0.3"),
        alone("univla", 30, "--profile=univla", "--seconds=0.3"),
        sanitized("memcheck"),
        sanitized("racecheck"),
    )


def run(chosen: Sequence[Part], out: Path, seconds: float, *, commit: str = "", again: bool = False) -> dict[str, str]:
    """Runs the parts that are not done, and records each in ``out/<name>/part.json``.

    Returns:
        by part, "done", "failed", "out of time", "absent" or "not reached".
    """
    end, states = time.monotonic() + seconds, {}
    for part in chosen:
        record = out / part.name / "part.json"
        if not again and _state(record) == "done":
            states[part.name] = "done"
            print(f"{part.name:16} done before", flush=True)
            continue
        left = end - time.monotonic()
        if left <= 0:
            states[part.name] = "not reached"
            print(f"{part.name:16} not reached", flush=True)
            continue
        begin = time.monotonic()
        reason = part.absent()
        state, output = ("absent", reason) if reason else _process(part, min(part.seconds, left), commit)
        taken = time.monotonic() - begin
        lines = output.splitlines()[-TAIL:]
        found = {
            "part": part.name,
            "state": state,
            "seconds": round(taken, 1),
            "command": part.shown(),
            "commit": commit or report.commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "output": lines,
        }
        report.replace_file(record, (json.dumps(found, indent=1) + "\n").encode())
        states[part.name] = state
        last = next((line for line in reversed(lines) if line.strip()), "")
        print(f"{part.name:16} {state} after {taken:.0f} s: {last[:120]}", flush=True)
    return states


def _state(record: Path) -> str:
    try:
        return str(json.loads(record.read_text())["state"])
    except (OSError, ValueError, KeyError):  # none yet, or one that was cut off
        return ""


def _process(part: Part, seconds: float, commit: str) -> tuple[str, str]:
    """Runs a part in a process group of its own; the state and its output."""
    environment = {**os.environ, "LAMKERNELS_COMMIT": commit, **part.environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, preexec_fn=_heed_interrupts,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return "done" if process.returncode == 0 else "failed", output
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # the benchmark writes the workloads it has, pytest its summary
        with contextlib.suppress(subprocess.TimeoutExpired):
            return "out of time", process.communicate(timeout=GRACE)[0]
        _kill(process)
        return "out of time", process.communicate()[0]
    finally:
        _kill(process)  # nothing of it outlives it


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment(commit: str) -> dict[str, Any]:
    """What ``lamkernels info`` knows, and the first lines of what the tools of CUDA say of themselves."""
    said = {}
    for tool in TOOLS:
        if shutil.which(tool):
            option = () if tool == "nvidia-smi" else ("--version",)
            done = subprocess.run((tool, *option), capture_output=True, text=True, check=False)
            said[tool] = done.stdout.splitlines()[:20]
    about = report.context("cuda" if torch.cuda.is_available() else "cpu", [])
    return {
        "context": {**about, "commit": commit or about["commit"], "command": "python -m bench.gpu"},
        "tools": said,
        **info.collect(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; 0 when each is done or cannot run here, 1 otherwise, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Tests, benchmarks, tuning sweep and sanitizer on this GPU."
    )
    parser.add_argument("--out", type=Path, help="where to write (bench/results/<device>)")
    parser.add_argument("--parts", help="some of them, with commas: " + ", ".join(part.name for part in parts(Path())))
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no part is started or goes on (9.5)")
    parser.add_argument("--commit", default="", help="what is measured, where the checkout has no .git")
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    parser.add_argument("--list", action="store_true", help="show the parts and their commands, and run nothing")
    args = parser.parse_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "device"
    out = (args.out or RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")).resolve()
    if out.is_relative_to(ROOT):  # the parts run there, and their records then name no path of this machine
        out = out.relative_to(ROOT)
        os.chdir(ROOT)
    chosen = {part.name: part for part in parts(out)}
    unknown = set((args.parts or "").replace(",", " ").split()) - set(chosen)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
    names = (args.parts or ",".join(chosen)).replace(",", " ").split()
    if args.list:
        for name in names:
            part = chosen[name]
            print(f"{name:16} {part.seconds:4.0f} s  {part.absent() or part.shown()}")
        return 0
    if not torch.cuda.is_available():
        print(
            f"python -m bench.gpu needs a CUDA or ROCm device, and torch {torch.__version__} finds none here; "
            "--list shows what would run", file=sys.stderr,
        )  # fmt: skip
        return 2
    found = environment(args.commit)
    report.replace_file(out / "environment.json", (json.dumps(found, indent=1) + "\n").encode())
    states = run([chosen[name] for name in names], out, 60 * args.minutes, commit=args.commit, again=args.again)
    print(f"results are in {out}; the same command goes on with what is not done")
    return int(any(state not in ("done", "absent") for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
