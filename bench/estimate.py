"""``lamkernels bench --estimate H200``: what a workload must cost on a named GPU. Runs no kernel and needs no GPU.

Bytes, operations and memory come from the model of :class:`~.workloads.Workload` that the measured rooflines use too;
the ceilings are published ones, so a measured roofline (:mod:`.peaks`) is lower.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lamkernels

from .peaks import Peaks, accurate_rate
from .report import replace_file
from .workloads import Workload


class Device(NamedTuple):
    """Published peaks without sparsity: GB/s, TF/s (products summed in fp32 on the tensor cores), GB."""

    bandwidth: float
    fp32: float
    tf32: float
    half: float
    memory: float

    def peaks(self, dtype: str, op: str = "") -> Peaks:
        """The ceilings for an operator and input of a dtype, by the rules of :func:`~.peaks.measure_peaks`."""
        rate = self.half
        if dtype == "float32":
            rate = accurate_rate(self.fp32, self.tf32, self.half if op == "covariance" else 0.0)
        return Peaks(self.bandwidth * 1e9, rate * 1e12)


# NVIDIA's data sheets (A10, A100, H100, H200, HGX B200, L4, L40S; rates "with sparsity" halved), the appendices of its
# Ampere GA102, Ada and RTX Blackwell architecture papers (RTX), and AMD's data sheets (Instinct MI300X, MI325X).
DEVICES = {
    "A10": Device(600, 31.2, 62.5, 125, 24),
    "A100": Device(2039, 19.5, 156, 312, 80),
    "A100 40GB": Device(1555, 19.5, 156, 312, 40),
    "B200": Device(7700, 75, 1100, 2250, 180),
    "H100": Device(3350, 67, 494.7, 989.4, 80),
    "H100 PCIe": Device(2000, 51, 378, 756, 80),
    "H200": Device(4800, 67, 494.7, 989.4, 141),
    "L4": Device(300, 30.3, 60, 121, 24),
    "L40S": Device(864, 91.6, 183, 362, 48),
    "MI300X": Device(5300, 163.4, 653.7, 1307.4, 192),
    "MI325X": Device(6000, 163.4, 653.7, 1307.4, 256),
    "RTX 3090": Device(936, 35.6, 35.6, 71, 24),
    "RTX 4090": Device(1008, 82.6, 82.6, 165.2, 24),
    "RTX 5090": Device(1792, 104.8, 104.8, 209.5, 32),
}


class Estimate(NamedTuple):
    """The least that a workload costs on a device.

    Attributes:
        device: its name in :data:`DEVICES`; op, N, K, D and dtype are those of the workload.
        bytes: of traffic: every input read once, every output written once.
        flops: operations that no exact method avoids.
        microseconds: neither ceiling lets anything undercut. The launch of a kernel is not in it.
        bound: the ceiling that decides, "memory" or "compute".
        peak_bytes: memory in use at once: inputs, outputs, and what a training step keeps.
        score_matrix_bytes: an N×K matrix of fp32, which methods that materialise distances need beside that.
        fits: whether ``peak_bytes`` are in the device.
    """

    device: str
    op: str
    N: int
    K: int
    D: int
    dtype: str
    bytes: int
    flops: int
    microseconds: float
    bound: str
    peak_bytes: int
    score_matrix_bytes: int
    fits: bool


def device_name(text: str) -> str:
    """The name in :data:`DEVICES` that is meant; case, spaces and hyphens do not matter."""

    def plain(name: str) -> str:
        return (
            name.lower().replace(" ", "").replace("-", "").replace("_", "").removeprefix("nvidia").removeprefix("amd")
        )

    names = {plain(name): name for name in DEVICES}
    if plain(text) not in names:
        raise ValueError(f"no published peaks of {text!r}; known are {', '.join(DEVICES)}")
    return names[plain(text)]


def estimate(workload: Workload, name: str) -> Estimate:
    """The least cost of a workload on a device of :data:`DEVICES`."""
    device = DEVICES[name]
    peaks = device.peaks(workload.dtype, workload.op)
    return Estimate(
        name, workload.op, workload.N, workload.K, workload.D, workload.dtype, workload.bytes, workload.flops,
        1e6 * peaks.seconds(workload.bytes, workload.flops), peaks.bound(workload.bytes, workload.flops),
        workload.peak_bytes, 0 if workload.op == "covariance" else workload.score_matrix_bytes,
        workload.peak_bytes <= device.memory * 1e9,
    )  # fmt: skip


def table(found: Sequence[Estimate]) -> str:
    """All of them, one line each."""
    head = ["", "MB moved", "GFLOP", "µs", "bound by", "peak MiB", "N×K MiB"]
    lines = [head]
    for row in found:
        name = f"{row.op} N={row.N} K={row.K} D={row.D} {row.dtype}"
        sizes = [f"{size / 2**20:.1f}" for size in (row.peak_bytes, row.score_matrix_bytes)]
        sizes[1] = sizes[1] if row.score_matrix_bytes else "–"
        cost = [
            f"{row.bytes / 1e6:.2f}",
            f"{row.flops / 1e9:.3f}",
            f"{row.microseconds:.3g}" if row.microseconds < 1e3 else f"{row.microseconds:.0f}",
        ]
        lines.append([name, *cost, row.bound, *sizes, *([] if row.fits else ["does not fit"])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=False)),
        ]
        shown.append("  ".join([*cells, *line[len(head) :]]).rstrip())
    return "\n".join(shown)


def run(workloads: Sequence[Workload], name: str, command: str, json_path: Path | None, csv_path: Path | None) -> int:
    """Prints the estimates and writes them where a path is given; the exit status."""
    device, found = DEVICES[name], [estimate(workload, name) for workload in workloads]
    print(
        f"{name}, published peaks: {device.bandwidth:g} GB/s, fp32 {device.fp32:g}, TF32 {device.tf32:g}, "
        f"fp16 and bf16 {device.half:g} TF/s, {device.memory:g} GB\n\n{table(found)}\n"
    )
    print("µs: the roofline, max(bytes / bandwidth, flops / peak); a launch comes on top. Nothing was run.")
    if json_path:
        about: dict[str, Any] = {"lamkernels": lamkernels.__version__, "command": command, "device": name}
        content = {"context": about | {"peaks": device._asdict()}, "estimates": [row._asdict() for row in found]}
        replace_file(json_path, (json.dumps(content, indent=1) + "\n").encode())
        print(f"wrote {json_path}")
    if csv_path:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([Estimate._fields, *found])
        replace_file(csv_path, text.getvalue().encode())
        print(f"wrote {csv_path}")
    return 0
