"""``python -m bench.gpu``: everything that a machine with a GPU can say, in one command of less than ten minutes.

Needs no network and no installation: the working directory is a checkout, and what is absent is a row or a part that
says so. Each part is a process with a time limit of its own; a part that is done is not run again, one that fails does
not keep the others from running. Parts that time nothing run side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
SAID = "output.txt"  # what a part said, beside its record
TAIL = 40  # lines of it that the record repeats
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
        shares: whether it runs beside its neighbours that do: nothing in it is timed.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    needs: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    shares: bool = False

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
        fixed = ("--device=cuda", f"--providers={PROVIDERS}", "--rounds=2", "--seconds=0.1", "--timeout=60", "--resume")
        return Part(name, seconds, (sys.executable, "-m", package, *options, *fixed, *files))

    def alone(name: str, seconds: float, option: str, more: str = "--quick") -> Part:
        command = (sys.executable, "-m", package, option, "--device=cuda", f"--json={out / name / 'bench.json'}")
        return Part(name, seconds, (*command, more))

    def sanitized(tool: str) -> Part:
        watch = ("compute-sanitizer", f"--tool={tool}", "--target-processes=application-only", "--error-exitcode=3")
        cases = (sys.executable, "-m", f"{package}.small_cases", "--device=cuda")
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(tool, 100, (*watch, *cases), "compute-sanitizer", own, shares=True)

    junit = f"--junitxml={out / 'tests' / 'junit.xml'}"
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2))  # most of their time is Triton's compiler
    several = ("-n", str(workers)) if importlib.util.find_spec("xdist") else ()
    lenient = ("-W", "default", "-p", "no:cacheprovider")  # a warning of another torch is shown and fails nothing
    tests = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", *lenient, *several, junit, "tests/gpu")
    return (
        Part("warm", 50, (sys.executable, "-m", f"{package}.warm", "--device=cuda"), "", ALONE),
        Part("tests", 100, tests, "pytest", ALONE, shares=True),
        sanitized("memcheck"),
        sanitized("racecheck"),
        suite("train_step", 60, "--suite=lam,tokenizer", "--op=train_step"),
        suite("targets", 65, "--suite=targets", "--op=nearest_code,vector_quantize"),
        alone("tune", 30, "--tune"),
        suite("nearest_code", 40, "--suite=lam,tokenizer", "--op=nearest_code"),
        suite("vector_quantize", 45, "--suite=lam,tokenizer", "--op=vector_quantize,code_statistics"),
        suite("covariance", 45, "--suite=targets,moments", "--op=covariance"),
        suite("memory", 30, "--suite=memory"),
        alone("compat", 15, "--compat"),
        alone("lapa", 25, "--profile=lapa", "--seconds=0.3"),
        alone("univla", 25, "--profile=univla", "--seconds=0.3"),
    )


@dataclass
class _Job:
    """A part that runs."""

    part: Part
    process: subprocess.Popen[bytes]
    begin: float
    end: float
    interrupted: bool = False

    def state(self) -> str:
        """What became of it, or "" while it runs. Out of time it is told to end, and may write what it has."""
        now = time.monotonic()
        if self.process.poll() is None:
            if now >= self.end and not self.interrupted:
                self.process.send_signal(signal.SIGINT)  # the benchmark writes its files, pytest its summary
                self.interrupted = True
            if now < self.end + GRACE:
                return ""
        _kill(self.process)
        return "out of time" if self.interrupted else "failed" if self.process.returncode else "done"


def longest(chosen: Sequence[Part]) -> float:
    """The seconds that parts take if each runs into its limit."""
    return sum(max(part.seconds for part in group) for group in _side_by_side(chosen))


def _side_by_side(chosen: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts in their order: neighbours that share the machine together, each other one by itself."""
    for _, group in itertools.groupby(chosen, key=lambda part: "" if part.shares else part.name):
        yield list(group)


def run(
    chosen: Sequence[Part], out: Path, seconds: float, *, commit: str = "", again: bool = False,
    archive: Path | None = None,
) -> dict[str, str]:  # fmt: skip
    """Runs the parts that are not done, records each in ``out/<name>/part.json``, and renews the archive after each
    (after the last of those that run side by side).

    Returns:
        by part, "done", "failed", "out of time", "absent" or "not reached".
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it, and so would the parts
    end = time.monotonic() + seconds - GRACE
    states: dict[str, str] = {}
    for group in _side_by_side(chosen):
        with contextlib.ExitStack() as stack:
            running = []
            for part in group:
                left = end - time.monotonic()
                if not again and _state(out / part.name / "part.json") == "done":
                    states[part.name] = "done"
                    print(f"{part.name:16} done before", flush=True)
                elif left <= 0:
                    states[part.name] = "not reached"
                    print(f"{part.name:16} not reached", flush=True)
                elif reason := part.absent():
                    states[part.name] = _record(part, "absent", 0.0, reason, out, commit)
                else:
                    if again:  # else a suite keeps the workloads that it has
                        (out / part.name / "bench.json").unlink(missing_ok=True)
                    running.append(_start(part, min(part.seconds, left), commit, out / part.name / SAID, stack))
            while running:
                for job in list(running):
                    state, taken = job.state(), time.monotonic() - job.begin
                    if not state:
                        continue
                    running.remove(job)
                    said = (out / job.part.name / SAID).read_text(errors="replace")
                    states[job.part.name] = _record(job.part, state, taken, said, out, commit)
                time.sleep(0.05)
        if archive is not None:
            pack(out, archive)
    return states


def _start(part: Part, seconds: float, commit: str, said: Path, stack: contextlib.ExitStack) -> _Job:
    """Starts a part in a process group of its own, of which nothing outlives the stack; its output goes to ``said``."""
    environment = {**os.environ, "LAMKERNELS_COMMIT": commit, **part.environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    said.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with said.open("wb") as output:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    stack.callback(_kill, process)
    return _Job(part, process, begin, begin + seconds)


def _record(part: Part, state: str, seconds: float, output: str, out: Path, commit: str) -> str:
    """Writes what became of a part, and says it; the state."""
    lines = output.splitlines()[-TAIL:]
    found = {
        "part": part.name,
        "state": state,
        "seconds": round(seconds, 1),
        "command": part.shown(),
        "commit": commit or report.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "output": lines,
    }
    report.replace_file(out / part.name / "part.json", (json.dumps(found, indent=1) + "\n").encode())
    last = next((line for line in reversed(lines) if line.strip()), "")
    print(f"{part.name:16} {state} after {seconds:.0f} s: {last[:120]}", flush=True)
    return state


def pack(out: Path, archive: Path) -> None:
    """Writes the folder ``out`` as one compressed tar file, whole or not at all."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(out, arcname=out.name)
    report.replace_file(archive, packed.getvalue())


def _state(record: Path) -> str:
    try:
        return str(json.loads(record.read_text())["state"])
    except (OSError, ValueError, KeyError):  # none yet, or one that was cut off
        return ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    parser.add_argument("--minutes", type=float, default=9.0, help="after which everything has ended (9)")
    parser.add_argument("--archive", type=Path, help="a .tar.gz file of all results, renewed after every part")
    parser.add_argument("--commit", default="", help="what is measured, where the checkout has no .git")
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    parser.add_argument("--list", action="store_true", help="show the parts and their commands, and run nothing")
    args = parser.parse_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "device"
    archive = args.archive.resolve() if args.archive else None
    out = (args.out or RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")).resolve()
    if archive is not None and archive.is_relative_to(out):
        parser.error("--archive cannot lie in the folder that it packs")
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
    states = run(
        [chosen[name] for name in names], out, 60 * args.minutes, commit=args.commit, again=args.again, archive=archive
    )
    print(f"results are in {out}; the same command goes on with what is not done")
    return int(any(state not in ("done", "absent") for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
