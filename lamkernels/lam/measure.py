"""What a bottleneck costs: time, operators or kernel launches, peak memory; interleaved, so that noise hits all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def synchronize(device: torch.device) -> None:
    """Waits for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, the device's work included, s."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def bottleneck_costs(
    bottlenecks: Mapping[str, nn.Module], x: Tensor, *, repeats: int, budget_s: float = 20.0
) -> dict[str, dict[str, Any]]:
    """Costs of one training forward and backward of each bottleneck on the same rows.

    The modules are left in training mode with their state advanced; pass copies.

    Args:
        bottlenecks: by name; ``quantized, indices, loss = bottleneck(x)``.
        x: (..., D) float: the rows.
        repeats: timed rounds; in each, every bottleneck runs once, in turn.
        budget_s: stop after so much time, but not before three rounds, s.

    Returns:
        By name: "time_ms" (median of forward + backward), "time_ms_quartiles", "rounds", "operators" (torch operators
        called on the host), "kernel_launches" (on a GPU; None on a CPU), "peak_extra_mib" (torch allocations beyond
        what was held before, MiB).
    """
    device = x.device
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    actions = {name: _forward_backward(module.train(), x, grad) for name, module in bottlenecks.items()}
    for action in actions.values():  # warm up: k-means, compilation, allocator
        action()
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    begin = time.perf_counter()
    for done in range(repeats):
        for name in list(actions) if done % 2 else reversed(list(actions)):
            times[name].append(seconds(actions[name], device))
        if done >= 2 and time.perf_counter() - begin > budget_s:
            break
    costs: dict[str, dict[str, Any]] = {}
    for name, action in actions.items():
        low, middle, high = statistics.quantiles(times[name], n=4) if len(times[name]) > 1 else 3 * times[name]
        operators, launches = count_operators(action, device)
        costs[name] = {
            "time_ms": 1e3 * middle,
            "time_ms_quartiles": [1e3 * low, 1e3 * high],
            "rounds": len(times[name]),
            "operators": operators,
            "kernel_launches": launches,
            "peak_extra_mib": peak_extra_bytes(action, device) / 2**20,
        }
    return costs


def count_operators(action: Callable[[], object], device: torch.device) -> tuple[int, int | None]:
    """Torch operators that one call runs (nested ones counted once), and kernels it launches on a GPU, else None."""
    with _profile(device) as profiler:
        action()
        synchronize(device)
    events = profiler.events() or []  # type: ignore[no-untyped-call]
    operators = sum(1 for event in events if event.name.startswith("aten::") and not _inside_operator(event))
    operators += sum(1 for event in events if event.name.startswith("lamkernels::") and not _inside_operator(event))
    if device.type != "cuda":
        return operators, None
    launches = sum(1 for event in events if "LaunchKernel" in event.name or "LaunchCooperative" in event.name)
    return operators, launches


def _inside_operator(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(("aten::", "lamkernels::")):
            return True
        parent = parent.cpu_parent
    return False


def peak_extra_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocations exceed their level before the call, bytes.

    On a GPU from the allocator's peak; on a CPU from the allocation events of ``torch.profiler``, which do not see
    memory that numpy or a kernel allocates for itself.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _profile(device, profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        ((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"),
        key=lambda change: change[0],
    )
    level = peak = 0
    for _, size in changes:
        level += size
        peak = max(peak, level)
    return peak


@contextlib.contextmanager
def _profile(device: torch.device, *, profile_memory: bool = False) -> Iterator[profile]:
    """torch's profiler, without the lines that its library prints at every start and stop, come what may."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with profile(activities=activities, profile_memory=profile_memory, acc_events=True) as profiler:
            yield profiler
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _forward_backward(bottleneck: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    leaf = x.detach().clone().requires_grad_()

    def action() -> None:
        leaf.grad = None
        quantized, _, loss = bottleneck(leaf)
        torch.autograd.backward([quantized, loss], [grad, torch.ones_like(loss)])

    return action
