"""Runs workloads: one fresh process per provider, taking turns, and a row for whatever comes of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from .peaks import Peaks
from .providers import PROVIDERS, Provider
from .report import Row, rank
from .workloads import Workload

LONG = 20  # times the seconds of a turn: who takes longer on a GPU, where times do not wander, has one turn
PAUSE = 0.1  # seconds between turns on a CPU, in which the threads of the last provider stop spinning
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        threads: for every provider alike.
        rounds: how often the providers take turns.
        seconds: of sampling in each turn.
        timeout: seconds for one answer; past it, a provider is stopped and its row says so.
    """

    device: str = "cpu"
    threads: int = 1
    rounds: int = 3
    seconds: float = 1.0
    timeout: float = 600.0


class ProviderProcess:
    """A worker process. Any failure of it comes back as an answer with an "error"; the next request starts it anew."""

    def __init__(self, provider: str, settings: Settings) -> None:
        self.provider, self.settings = provider, settings
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer."""
        if self.process is None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=self.settings.timeout)
        except queue.Empty:
            self.close()
            return {"error": f"no answer in {self.settings.timeout:g} s"}
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().rpartition("\n")[2]
        self.close()
        ended = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        return {"error": f"its process {ended}" + (f": {last}" if last else "")}

    def start(self) -> None:
        """Starts the process, which then imports and waits for requests."""
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(self.settings.threads))}
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers beside the measurement
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (close() closes it)
        self.answers = queue.Queue()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"{__package__}.worker",
                self.provider,
                self.settings.device,
                str(self.settings.threads),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        threading.Thread(target=_forward, args=(self.process, self.answers), daemon=True).start()

    def close(self) -> None:
        """Ends the process."""
        if self.process is None:
            return
        process, self.process = self.process, None
        process.kill()
        process.wait()
        for stream in (process.stdin, self.errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # an unsent request
                stream.close()


def _forward(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            answers.put(line)
    answers.put("")


def run(workloads: Sequence[Workload], names: Sequence[str], settings: Settings) -> Iterator[list[Row]]:
    """The rows of each workload in turn, one for each provider that has its op."""
    processes: dict[str, ProviderProcess] = {}
    try:
        for workload in workloads:
            providers = [PROVIDERS[name] for name in names if workload.op in PROVIDERS[name].prepare]
            if workload.measure == "memory":
                yield rank(_memory(workload, providers, settings))
            else:
                yield rank(_time(workload, providers, processes, settings))
    finally:
        for process in processes.values():
            process.close()


@dataclass
class _Contestant:
    """A provider whose result is right, and what its turns gave."""

    process: ProviderProcess
    row: Row
    rounds: list[list[float]] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)
    long: bool = False


def _time(
    workload: Workload, providers: Sequence[Provider], processes: dict[str, ProviderProcess], settings: Settings
) -> list[Row]:
    """In turns, or where the memory does not hold the inputs of all and as much again, one after another."""
    free = _free_memory(settings.device)
    if free is None or 2 * len(providers) * workload.peak_bytes < free:
        return _in_turns(workload, providers, processes, settings)
    return [row for provider in providers for row in _in_turns(workload, [provider], processes, settings)]


def _in_turns(
    workload: Workload, providers: Sequence[Provider], processes: dict[str, ProviderProcess], settings: Settings
) -> list[Row]:
    rows, contestants = [], []
    if settings.device == "cuda":  # their imports overlap, which on a CPU would disturb what tries its variants
        for provider in providers:
            if not provider.absent(settings.device) and provider.name not in processes:
                processes[provider.name] = ProviderProcess(provider.name, settings)
                processes[provider.name].start()
    for provider in providers:
        row = _new_row(workload, provider, settings)
        rows.append(row)
        if row.status:
            continue
        process = processes.setdefault(provider.name, ProviderProcess(provider.name, settings))
        answer = process.ask("prepare", workload=asdict(workload))
        _take_check(row, answer)
        if not row.status:
            row.bandwidth_gbs, row.peak_gflops = answer["bandwidth"] / 1e9, answer["flops"] / 1e9
            contestants.append(_Contestant(process, row))
    for turn in range(settings.rounds):
        shift = turn % max(1, len(contestants))
        for contestant in contestants[shift:] + contestants[:shift]:
            if contestant.row.status or contestant.long:
                continue
            time.sleep(PAUSE if settings.device == "cpu" else 0.0)
            begin = time.monotonic()
            answer = contestant.process.ask("time", seconds=settings.seconds, graph=turn == 0)  # replays do not wander
            if answer.get("error"):
                contestant.row.status, contestant.row.note = "error", answer["error"]
                continue
            contestant.long = settings.device == "cuda" and time.monotonic() - begin > LONG * settings.seconds
            contestant.rounds.append(answer["samples"])
            contestant.wall += [answer["wall"]] if "wall" in answer else []
            contestant.graph += [answer["graph"]] if answer.get("graph") else []
    for contestant in contestants:
        if not contestant.row.status:
            _take_times(contestant, workload)
        if contestant.process.process is not None:
            contestant.process.ask("drop")
    return rows


def _memory(workload: Workload, providers: Sequence[Provider], settings: Settings) -> list[Row]:
    rows = [_new_row(workload, provider, settings) for provider in providers]
    with contextlib.ExitStack() as stack:
        processes = {row.provider: ProviderProcess(row.provider, settings) for row in rows if not row.status}
        for process in processes.values():
            stack.callback(process.close)
            if settings.device == "cuda":  # their imports overlap; what one allocates is not counted with another
                process.start()
        for row in rows:
            if row.status:
                continue
            answer = processes[row.provider].ask("memory", workload=asdict(workload))
            processes[row.provider].close()
            _take_check(row, answer)
            if not row.status:
                row.status = "ok"
                row.peak_extra_mb = answer["peak"] / 2**20
                row.output_mb = workload.output_bytes / 2**20
                row.score_matrix_mb = workload.score_matrix_bytes / 2**20
    return rows


def _new_row(workload: Workload, provider: Provider, settings: Settings) -> Row:
    """A row with a status only where the provider is not started."""
    row = Row(
        suite=workload.suite,
        op=workload.op,
        N=workload.N,
        K=workload.K,
        D=workload.D,
        dtype=workload.dtype,
        device=settings.device,
        threads=settings.threads,
        provider=provider.name,
        kind=provider.kind,
        version=provider.version(),
    )
    reason = provider.absent(settings.device)
    if not reason and workload.dtype not in provider.dtypes:
        reason = f"takes {', '.join(provider.dtypes)} only"
    reason = reason or provider.refuses(workload)
    needed, free = provider.score_bytes(workload), _free_memory(settings.device)
    if reason:
        row.status, row.note = "absent", reason
    elif free is not None and needed > 0.8 * free:
        row.status = "skipped"
        row.note = f"its N×K matrices need about {needed / 2**30:.0f} GiB and {free / 2**30:.0f} GiB are free"
    return row


def _free_memory(device: str) -> int | None:
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _take_check(row: Row, answer: dict[str, Any]) -> None:
    for name in ("mismatch_rate", "max_regret", "contract", "checked_rows"):
        setattr(row, name, answer.get(name))
    if answer["error"]:
        row.status = "wrong" if "checked_rows" in answer else "error"
        row.note = " ".join(answer["error"].split())


def _take_times(contestant: _Contestant, workload: Workload) -> None:
    row, medians = contestant.row, [median(samples) for samples in contestant.rounds]
    pooled = sorted(sample for samples in contestant.rounds for sample in samples)
    deciles = quantiles(pooled, n=10, method="inclusive") if len(pooled) > 1 else pooled * 9
    row.status = "ok"
    row.time_ms, row.best_round_ms = median(medians), min(medians)
    row.p10_ms, row.p90_ms, row.calls = deciles[0], deciles[-1], len(pooled)
    row.wall_ms = median(contestant.wall) if contestant.wall else None
    row.graph_ms = median(contestant.graph) if contestant.graph else None
    assert row.bandwidth_gbs is not None and row.peak_gflops is not None
    peaks = Peaks(row.bandwidth_gbs * 1e9, row.peak_gflops * 1e9)
    row.bound = peaks.bound(workload.bytes, workload.flops)
    if row.kind == "floor":  # it moves and computes less than the workload's model says
        return
    seconds = row.time_ms / 1e3
    row.gflops, row.gbytes_s = workload.flops / seconds / 1e9, workload.bytes / seconds / 1e9
    row.roofline = peaks.seconds(workload.bytes, workload.flops) / seconds
