"""``lamkernels info``: versions, devices and backends, what "auto" picks and why not the others."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lamkernels
from lamkernels import ops
from lamkernels.backend import available_backends, resolve
from lamkernels.ops.parallel import threading

PACKAGES = ("lamkernels", "torch", "triton", "numba", "llvmlite", "numpy", "cupy-cuda12x", "cupy-cuda13x")


def versions() -> dict[str, str | None]:
    """The version of Python and of each package, None where it is not installed; imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["lamkernels"] = lamkernels.__version__
    found["torch"] = torch.__version__
    return found


def cpu() -> dict[str, Any]:
    """The model of the CPU, its vector width in bits, the flags that matter here, cores and torch's threads."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n")[0]
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.split("\n"))}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    capability = torch.backends.cpu.get_cpu_capability()
    if "avx512f" in flags or "AVX512" in capability:
        width = 512
    elif "avx2" in flags or "AVX2" in capability:
        width = 256
    else:
        width = 128
    telling = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "sve2")
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "vector_bits": width,
        "features": [flag for flag in telling if flag in flags],
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def gpus() -> list[dict[str, Any]]:
    """Each GPU that torch sees, with its compute capability and memory."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def hardware(device: str) -> str:
    """One line for a device: the GPU's name, or the CPU's model and cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    processor = cpu()
    return f"{processor['model']}, {processor['cores']} cores, {processor['vector_bits']}-bit vectors"


def choices() -> list[dict[str, Any]]:
    """For each operator and kind of device, the backend that "auto" picks now, and why not the others."""
    found = []
    status = available_backends()
    for name in operators():
        for device in ("cpu", "cuda"):
            try:
                picked, error = resolve("auto", device), ""
            except (RuntimeError, ValueError) as raised:
                picked, error = "", str(raised)
            if picked and not has_kernel(name, picked):
                error = f"this version has no {picked} kernel for {name}"
            others = {backend: _why_not(backend, name, device, picked) for backend in status if backend != picked}
            found.append({"op": name, "device": device, "auto": picked, "error": error, "not_the_others": others})
    return found


def operators() -> list[str]:
    """The folders of lamkernels/ops."""
    root = Path(ops.__path__[0])
    return sorted(path.parent.name for path in root.glob("*/op.py"))


def has_kernel(operator: str, backend: str) -> bool:
    """Whether an operator has an implementation for a backend."""
    return (Path(ops.__path__[0]) / operator / f"{backend}.py").exists()


def _why_not(backend: str, operator: str, device: str, picked: str) -> str:
    if os.environ.get("LAMKERNELS_BACKEND", "auto") != "auto":
        return "LAMKERNELS_BACKEND asks for another"
    if not available_backends()[backend].available:
        return available_backends()[backend].reason
    try:
        resolve(backend, device)
    except ValueError:
        return f"runs on {available_backends()[backend].reason}"
    if not has_kernel(operator, backend):
        return "no kernel for this operator"
    if backend == "cuda":
        return "only on request: not yet measured on a GPU"
    return f"the specification, slower than {picked}" if backend == "reference" else f"{picked} comes first"


def collect() -> dict[str, Any]:
    """Everything that :func:`main` shows."""
    asked = os.environ.get("LAMKERNELS_BACKEND")
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "gpus": gpus(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "numba_threads": threading(),
        "LAMKERNELS_BACKEND": asked,
        "backends": {name: status._asdict() for name, status in available_backends().items()},
        "auto": choices(),
    }


def render(found: dict[str, Any]) -> str:
    """The same as text."""
    processor = found["cpu"]
    lines = ["versions"]
    lines += [f"  {name:14}{version or 'not installed'}" for name, version in found["versions"].items()]
    features = " ".join(processor["features"])
    lines += ["", "devices", f"  {'platform':14}{found['platform']}"]
    lines += [f"  {'cpu':14}{processor['model']}, {processor['cores']} cores, torch uses {processor['torch_threads']}"]
    lines += [f"  {'vectors':14}{processor['vector_bits']} bits{f' ({features})' if features else ''}"]
    for gpu in found["gpus"]:
        text = f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB, {gpu['multiprocessors']} SMs"
        lines.append(f"  {'gpu ' + str(gpu['index']):14}{text}")
    if not found["gpus"]:
        built = found["cuda"] or found["rocm"]
        lines.append(
            f"  {'gpu':14}none ({'torch sees no device' if built else 'this torch is built for the CPU only'})"
        )
    lines.append(f"  {'numba threads':14}{found['numba_threads']}")
    lines += ["", "backends"]
    for name, status in found["backends"].items():
        lines.append(f"  {name:14}{'available' if status['available'] else 'no':11}{status['reason']}")
    asked = found["LAMKERNELS_BACKEND"]
    lines += ["", 'what "auto" picks' + (f" (LAMKERNELS_BACKEND={asked})" if asked else "")]
    alike: dict[str, list[dict[str, Any]]] = {}
    for choice in found["auto"]:  # operators that differ in nothing but their names share an entry
        alike.setdefault(json.dumps({**choice, "op": ""}), []).append(choice)
    for choice, *more in sorted(alike.values(), key=lambda group: group[0]["device"]):
        names = ", ".join(c["op"] for c in (choice, *more))
        lines.append(f"  {choice['device'] + ' tensors':14}{choice['auto'] or 'nothing':11}for {names}")
        if choice["error"]:
            lines.append(f"    error: {choice['error']}")
        for backend, reason in choice["not_the_others"].items():
            lines.append(f"    not {backend:10}{reason}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what can run here, as text or with ``--json`` as JSON."""
    parser = argparse.ArgumentParser(
        prog="lamkernels info", description="Versions, devices and backends; what 'auto' picks and why not the others."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = collect()
    print(json.dumps(found, indent=1) if parser.parse_args(argv).json else render(found))
    return 0
