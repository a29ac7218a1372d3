"""The process of one provider: ``python -m lamkernels.bench.worker PROVIDER DEVICE THREADS``.

It reads one JSON request per line from its standard input and answers each with one line on its standard output, so
that its parent decides whose turn it is. It ends with its input.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lamkernels.graphs import clean_up

from .check import check
from .peaks import Peaks, measure_peaks
from .providers import PROVIDERS, Run
from .workloads import Inputs, Workload, make_inputs

MAX_SAMPLES = 2000
MAX_BUFFERS = 16
CYCLES, LONGEST_SPIN = 2e9, 0.02  # a second of a GPU's clock at the most, and seconds
WARM_UP_ROWS = (512, 768)  # of a memory measurement; two sizes, so that a compiler learns that N varies


class Session:
    """What one provider has prepared. The methods are the requests; each returns what is sent back."""

    def __init__(self, provider: str, device: str, threads: int) -> None:
        self.provider, self.device, self.threads = PROVIDERS[provider], device, threads
        self.peaks: dict[tuple[str, str], Peaks] = {}
        self.call: Run | None = None
        self.buffers = 0

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Builds the inputs, runs once, and checks the result against fp64."""
        self.drop()
        kind = (workload.dtype, workload.op if workload.op == "covariance" else "")
        if kind not in self.peaks:
            self.peaks[kind] = measure_peaks(self.device, *kind)
        self.buffers = _buffer_count(workload, self.device)
        inputs = make_inputs(workload, self.device, buffers=self.buffers, threads=self.threads)
        torch.backends.cuda.matmul.allow_tf32 = False  # a provider may have allowed it for the halves before
        self.call = self.provider.prepare[workload.op](workload, inputs)
        verdict = check(
            workload, inputs, self.call(0), strict=self.provider.kind != "peer", few_rows=self.provider.few_rows
        )
        if verdict.error:
            self.drop()
        return {**verdict._asdict(), **self.peaks[kind]._asdict()}

    def time(self, seconds: float, graph: bool) -> dict[str, Any]:
        """Samples for about this long: the time of each call in ms; on a GPU also wall and, if asked, graph times."""
        assert self.call is not None
        if self.device == "cpu":
            return {"samples": _sample_cpu(self.call, self.buffers, seconds)}
        return {
            "samples": _sample_gpu(self.call, self.buffers, seconds),
            "wall": median(_sample_cpu(self.call, self.buffers, seconds / 2, torch.cuda.synchronize)),
            "graph": _graph_time(self.call, self.buffers, seconds / 2) if graph else None,
        }

    def memory(self, workload: Workload) -> dict[str, Any]:
        """The peak memory of one call above what was there before it, in bytes. Wants a fresh process."""
        full = make_inputs(workload, self.device, threads=self.threads)
        sizes = (*WARM_UP_ROWS, workload.N)
        inputs = Inputs(
            [full.x[0][:rows] for rows in sizes],
            full.codebook,
            [full.indices[0][:rows] for rows in sizes],
            self.threads,
            tune=False,
        )
        call = self.provider.prepare[workload.op](workload, inputs)
        for warm_up in range(len(WARM_UP_ROWS)):
            call(warm_up)
        before = _reset_peak(self.device)
        result = call(len(WARM_UP_ROWS))
        peak = _peak(self.device) - before
        strict = self.provider.kind != "peer"
        return {**check(workload, full, result, strict=strict)._asdict(), "peak": peak}

    def drop(self) -> dict[str, Any]:
        """Frees the workload."""
        self.call = None
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return {}


def _sample_cpu(
    run: Run, buffers: int, seconds: float, synchronize: Callable[[], object] = lambda: None
) -> list[float]:
    """Wall times in ms, after a warm-up of a tenth of the time. Where a call takes longer than all of it, one is timed.

    A call counts as that long once three in a row were: a compiler may still compile in the first ones.
    """
    clock = time.perf_counter
    samples: list[float] = []
    begin, calls, long = clock(), 0, 0
    while long < 3 and (long or calls < 2 or clock() - begin < seconds / 10):
        start = clock()
        run(calls % buffers)
        synchronize()
        calls += 1
        long = long + 1 if clock() - start > seconds else 0
    if long:
        seconds = 0.0
    begin = clock()
    while not samples or (clock() - begin < seconds and len(samples) < MAX_SAMPLES):
        start = clock()
        run(len(samples) % buffers)
        synchronize()
        samples.append((clock() - start) * 1e3)
    return samples


def _sample_gpu(run: Run, buffers: int, seconds: float) -> list[float]:
    """GPU times in ms, by events. A spin ahead of each call, twice as long as the host takes for it, lets the launches
    queue up, so that gaps between them do not count, unless the provider itself waits for the GPU. Of calls that take
    longer than all of it there are two.
    """
    samples: list[float] = []
    host = LONGEST_SPIN
    begin = time.perf_counter()
    for warm in range(3):
        start_of_call = time.perf_counter()
        run(warm % buffers)
        host = min(host, time.perf_counter() - start_of_call)
        torch.cuda.synchronize()
        if time.perf_counter() - begin > seconds:
            break
    spin = int(CYCLES * min(max(1e-3, 2 * host), LONGEST_SPIN))
    begin = time.perf_counter()
    while len(samples) < (2 if time.perf_counter() - begin > seconds else 5) or (
        time.perf_counter() - begin < seconds and len(samples) < MAX_SAMPLES
    ):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(spin)  # type: ignore[no-untyped-call]
        start.record()
        run(len(samples) % buffers)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return samples


def _graph_time(run: Run, buffers: int, seconds: float) -> float | None:
    """Time of a call inside a CUDA graph of one call per buffer, in ms; None where it cannot be captured.

    A call that waits for the GPU is not tried: a capture that fails leaves torch's allocator and generator half in it.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(0)
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for buffer in range(buffers):
                run(buffer)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for buffer in range(buffers):
                run(buffer)

        def replay(_: int) -> dict[str, Any]:
            graph.replay()
            return {}

        return median(_sample_gpu(replay, 1, seconds)) / buffers
    except Exception:  # a synchronisation or an allocation that a capture does not allow, of whatever type
        torch.cuda.synchronize()
        clean_up(here)
        return None


def _buffer_count(workload: Workload, device: str) -> int:
    """Enough buffers that x has left the last cache before it comes round again.

    The LAM sizes have one: in training their rows come out of the layer before, in cache.
    """
    if workload.suite == "lam":
        return 1
    return min(MAX_BUFFERS, max(1, math.ceil(2 * last_level_cache(device) / workload.row_bytes)))


def last_level_cache(device: str) -> int:
    """Bytes; 32 MiB where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units.get(size[-1], 1) for size in sizes if size[:-1].isdigit()), default=2**25)


def _reset_peak(device: str) -> int:
    """Starts a new high-water mark; returns the memory held now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    _return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    return _status_bytes("VmRSS")


def _peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    return _status_bytes("VmHWM")


def _return_free_memory() -> None:
    """What the warm-up freed goes back to the system; otherwise the call could reuse it unseen."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status; raises where there is none (memory is measured on Linux and on GPUs)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(argv: list[str]) -> None:
    provider, device, threads = argv[0], argv[1], int(argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(threads)
    session = Session(provider, device, threads)
    for line in sys.stdin:
        request = json.loads(line)
        if "workload" in request:
            request["workload"] = Workload(**{**request["workload"], "devices": tuple(request["workload"]["devices"])})
        try:
            answer = getattr(session, request.pop("do"))(**request)
        except Exception as error:  # whatever a provider raises is a row of the report
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
