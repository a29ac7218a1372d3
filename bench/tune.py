"""``lamkernels bench --tune``: which tile is fastest on this GPU, as rows for ``tuning.MEASURED``.

For each workload, the rule of tuning.py that decides its tile; the tiles around the one that the rule gives, less those
that cannot fit; those of them that compile without spills; their times, once their results have passed the check. A
tile that beats the rule's by more than the noise becomes a row, ready to paste.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch

from lamkernels import tuning
from lamkernels.tuning import Tile

from . import report
from .workloads import Workload

Key = tuple[Hashable, ...]
MARGIN = 0.03  # of the time that a tile has to save before it is worth a row
MOST = 16  # tiles tried for a workload
REGISTERS = 65536  # of a multiprocessor, for the sums that a program holds; and 255 for a thread
FALLBACK_SHARED = 48 * 1024  # of a target that is not listed
KERNELS = {  # by rule, the kernels that run with its tile
    "resident": ("nearest_code_resident_kernel", "vector_quantize_fwd_kernel", "code_sums_kernel"),
    "lookup": ("nearest_code_resident_kernel",),
    "streamed": ("nearest_code_streamed_kernel",),
    "segments": ("segment_sums_kernel",),
    "products": ("scatter_kernel",),
}
RULES = {
    "nearest_code": ("lookup", "resident", "streamed"),
    "vector_quantize": ("resident",),
    "code_statistics": ("segments",),
    "covariance": ("products",),
}
WORKLOADS = (
    Workload("tune", "vector_quantize", 256, 8, 32),
    Workload("tune", "vector_quantize", 65536, 64, 16),
    Workload("tune", "vector_quantize", 1048576, 16, 128),
    Workload("tune", "nearest_code", 1048576, 64, 64, "bfloat16"),
    Workload("tune", "nearest_code", 65536, 1024, 64),
    Workload("tune", "nearest_code", 1048576, 256, 128, "float16"),
    Workload("tune", "nearest_code", 262144, 8192, 256, "bfloat16"),
    Workload("tune", "code_statistics", 65536, 1024, 64),
    Workload("tune", "covariance", 1000000, 0, 64),
    Workload("tune", "covariance", 50000, 0, 512),
)


class Sweep(NamedTuple):
    """What came of one workload.

    Attributes:
        workload: its name.
        rule: the function of tuning.py.
        key: of the row in ``tuning.MEASURED``.
        given: what the rule gives.
        times: by tile, ms; that of ``given`` is among them unless it failed.
        rejected: by tile, why it was not timed.
    """

    workload: str
    rule: str
    key: Key
    given: Tile
    times: dict[Tile, float]
    rejected: dict[Tile, str]

    @property
    def best(self) -> Tile | None:
        """The tile worth a row: the fastest, if it saves more than MARGIN of the given one's time."""
        if not self.times:
            return None
        fastest = min(self.times, key=lambda tile: self.times[tile])
        given = self.times.get(self.given, float("inf"))
        return fastest if self.times[fastest] < (1 - MARGIN) * given else None

    def row(self) -> str:
        """The line of ``tuning.MEASURED``, or "" where the rule's tile stays."""
        if self.best is None:
            return ""
        before = (
            f"{self.times[self.given]:.4g} ms by the rule" if self.given in self.times else "the rule's tile failed"
        )
        tile = f"Tile({', '.join(map(str, self.best))})"
        return f"    {self.key!r}: {tile},  # {self.times[self.best]:.4g} ms; {before}"


class _Asked(dict[Key, Tile]):
    """A table of rows that has none, and remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_asked: list[Key] = []

    def get(self, key: Any, default: Any = None) -> Any:
        self.keys_asked.append(key)
        return default


def consulted(workload: Workload, target: str) -> tuple[str, Key, Tile]:
    """The rule that decides the tile of a workload on a target, the key of its row, and what it gives without one.

    Raises:
        ValueError: no rule that can be tuned decides it.
    """
    asked, given = _Asked(), {}

    def spy(rule: str) -> Callable[..., Tile | None]:
        original = getattr(tuning, rule)

        def ask(*args: Any, **options: Any) -> Tile | None:
            tile: Tile | None = original(*args, **options)
            given[rule] = tile
            return tile

        return ask

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(tuning, "MEASURED", asked))
        for name in KERNELS:
            stack.enter_context(mock.patch.object(tuning, name, spy(name)))
        from .ahead import record

        record(target, lambda: call_on_meta(workload))
    for rule in RULES.get(workload.op, ()):
        keys, tile = [key for key in asked.keys_asked if key[0] == rule], given.get(rule)
        if keys and tile is not None:
            return rule, keys[0], tile
    raise ValueError(f"no rule that can be tuned decides {workload.name} on {target}")


def call_on_meta(workload: Workload) -> None:
    """The operator of a workload, on tensors without memory; for the recorder."""
    from lamkernels.ops.code_statistics.triton import code_statistics
    from lamkernels.ops.covariance.triton import covariance
    from lamkernels.ops.nearest_code.triton import nearest_code
    from lamkernels.ops.vector_quantize.triton import vector_quantize

    x = torch.empty(1, workload.N, workload.D, dtype=workload.torch_dtype, device="meta")
    codebook = torch.empty(1, workload.K, workload.D, dtype=workload.torch_dtype, device="meta")
    if workload.op == "covariance":
        covariance(x, None, None, workload.K, "default")
    elif workload.op == "code_statistics":
        code_statistics(x, torch.empty(1, workload.N, dtype=torch.int64, device="meta"), workload.K)
    elif workload.op == "nearest_code":
        nearest_code(x, codebook, "l2", "default", False)
    else:  # with those that share its tile
        vector_quantize(x, codebook, None, None, "l2", "default", "ste")
        nearest_code(x, codebook, "l2", "default", False)
        code_statistics(x, torch.empty(1, workload.N, dtype=torch.int64, device="meta"), workload.K)


def candidates(rule: str, target: str, given: Tile, itemsize: int) -> list[Tile]:
    """Tiles around the given one that may fit a target, the nearest first, at most MOST; without the given one."""
    from .ahead import SHARED

    limit = SHARED.get(target, FALLBACK_SHARED)
    wide = target.startswith("gfx")
    found = [tile for tile in _variants(rule, given) if tile != given and _may_fit(rule, tile, itemsize, limit, wide)]
    changes = {tile: sum(a != b for a, b in zip(tile, given, strict=True)) for tile in found}
    return sorted(found, key=lambda tile: (changes[tile], tile))[:MOST]


def _variants(rule: str, given: Tile) -> Iterator[Tile]:
    warps, stages = (4, 8), (1, 2, 3, 4)
    if rule in ("resident", "lookup"):  # its codes and entries are the codebook's
        for rows, w, s in product((16, 32, 64, 128, 256), warps, stages if rule == "lookup" else (1, 2)):
            yield given._replace(rows=rows, warps=w, stages=s)
    elif rule == "streamed":
        for rows, codes, dim, w, s in product((64, 128, 256), (64, 128, 256), (32, 64, 128, 256), warps, stages):
            for registers in {given.registers, given.registers and tuning.REGISTERS}:
                yield given._replace(rows=rows, codes=codes, dim=dim, warps=w, stages=s, registers=registers)
    elif rule == "segments":  # a slot for each row
        for rows, dim, w, s in product((32, 64, 128), (16, 32, 64), warps, (1, 2)):
            yield given._replace(rows=rows, codes=rows, dim=dim, warps=w, stages=s)
    elif rule == "products":
        for rows, dim, w, s in product((16, 32, 64, 128), (16, 32, 64, 128), warps, stages):
            yield given._replace(rows=rows, dim=dim, warps=w, stages=s)
    else:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(KERNELS)}")


def _may_fit(rule: str, tile: Tile, itemsize: int, limit: int, wide: bool) -> bool:
    """Whether what a program must hold is within a multiprocessor: the compiler decides the rest."""
    threads = tile.warps * (64 if wide else 32)
    held, staged = {  # fp32 sums in registers, and entries that pass through shared memory in each stage
        "resident": (tile.rows * tile.codes + tile.codes * tile.dim, tile.rows * tile.dim),
        "lookup": (tile.rows * tile.codes, tile.rows * tile.dim),
        "streamed": (tile.rows * tile.codes, (tile.rows + tile.codes) * tile.dim),
        "segments": (tile.rows * tile.dim, tile.rows * tile.dim),
        "products": (tile.dim * tile.dim, 2 * tile.rows * tile.dim),
    }[rule]
    return held // threads <= 160 and held <= REGISTERS // 2 and staged * itemsize * tile.stages <= limit


def why_not(workload: Workload, target: str, rule: str, key: Key, tile: Tile) -> str:
    """Compiles the kernels of a rule with a tile: why it will not do, or ""."""
    from .ahead import SHARED, compiled, use

    sharing = {workload}
    if rule == "resident":  # its row serves all operators and dtypes of that size
        sharing = {replace(workload, op="vector_quantize", dtype=dtype) for dtype in (workload.dtype, "float32")}
    with mock.patch.dict(tuning.MEASURED, {key: tile}):
        try:
            built = [kernel for one in sharing for kernel in compiled(target, functools.partial(call_on_meta, one))]
        except Exception as error:  # Triton's compiler fails in ways of many types
            return f"does not compile: {type(error).__name__}: {error}".splitlines()[0][:200]
    for name, kernel in built:
        if name in KERNELS[rule]:
            try:
                taken = use(kernel)
            except FileNotFoundError:
                return ""  # no tool to look with: the launch will say what does not fit
            if taken.stack:
                return f"{taken.stack} bytes of stack: it spills"
            if taken.shared > SHARED.get(target, FALLBACK_SHARED):
                return f"{taken.shared} bytes of shared memory"
    return ""


def sweep(
    workload: Workload, target: str, refuse: Callable[[Sequence[Tile]], Sequence[str]], measure: Callable[[Tile], float]
) -> Sweep:
    """Tries the tiles of one workload.

    Args:
        workload: what is run.
        target: "sm_90" and the like.
        refuse: for each tile why it is not tried, or "".
        measure: ms of a tile; raises where it fails or its result is wrong.
    """
    rule, key, given = consulted(workload, target)
    found = Sweep(workload.name, rule, key, given, {}, {})
    tiles = [given, *candidates(rule, target, given, workload.torch_dtype.itemsize)]
    for tile, reason in zip(tiles, ["", *refuse(tiles[1:])], strict=True):
        if not reason:
            try:
                found.times[tile] = measure(tile)
                continue
            except Exception as error:  # out of a resource, or wrong: whatever it is, this tile is out
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        found.rejected[tile] = reason
    return found


def measurer(workload: Workload, key: Key, seconds: float) -> Callable[[Tile], float]:
    """On the GPU of this process: checks the result of a tile against fp64, then gives the median of its times, ms."""
    from .check import check
    from .providers import PROVIDERS
    from .worker import _buffer_count, _sample_gpu
    from .workloads import make_inputs

    buffers = _buffer_count(workload, "cuda")
    inputs = make_inputs(workload, "cuda", buffers=buffers)
    call = PROVIDERS["triton"].prepare[workload.op](workload, inputs)

    def measure(tile: Tile) -> float:
        with mock.patch.dict(tuning.MEASURED, {key: tile}):
            verdict = check(workload, inputs, call(0), strict=True)
            if verdict.error:
                raise ValueError(verdict.error)
            return median(_sample_gpu(call, buffers, seconds))

    return measure


def run(workloads: Sequence[Workload], seconds: float, path: Path | None, argv: Sequence[str]) -> int:
    """Sweeps on this GPU, prints the rows, writes everything; 1 when a rule's own tile failed, 130 when interrupted."""
    target = tuning.target_of(torch.device("cuda"))
    found: list[Sweep] = []
    interrupted = False
    context = multiprocessing.get_context("spawn")  # a process that has used the GPU cannot fork
    with ProcessPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1), mp_context=context) as pool:
        try:
            for workload in workloads:
                rule, key, _ = consulted(workload, target)

                def refuse(
                    tiles: Sequence[Tile], at: Workload = workload, rule: str = rule, key: Key = key
                ) -> list[str]:
                    return [
                        job.result() for job in [pool.submit(why_not, at, target, rule, key, tile) for tile in tiles]
                    ]

                found.append(sweep(workload, target, refuse, measurer(workload, key, seconds)))
                print(summary(found[-1]), flush=True)
                torch.cuda.empty_cache()
        except KeyboardInterrupt:
            interrupted = True
            pool.shutdown(wait=False, cancel_futures=True)
            print("interrupted: what follows covers the workloads above", file=sys.stderr)
    rows = [row for row in (one.row() for one in found) if row]
    print("\nfor MEASURED in lamkernels/tuning.py:\n" + ("\n".join(rows) or "    nothing: the rules' tiles stay"))
    if path:
        content = {
            "context": report.context("cuda", argv),
            "target": target,
            "sweeps": [_plain(one) for one in found],
        }
        report.replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
        print(f"wrote {path}")
    return 130 if interrupted else int(any(one.given in one.rejected for one in found))


def summary(found: Sweep) -> str:
    """One workload: the given tile, the best one, and how many there were."""
    given = f"{found.times[found.given]:.4g} ms" if found.given in found.times else found.rejected[found.given]
    best = f"; best {tuple(found.best)}: {found.times[found.best]:.4g} ms" if found.best else "; it stays"
    counts = f"{len(found.times)} timed, {len(found.rejected)} rejected"
    return f"{found.workload}: {found.rule} {tuple(found.given)} {given}{best} ({counts})"


def _plain(found: Sweep) -> Mapping[str, Any]:
    times = [{"tile": list(tile), "ms": ms} for tile, ms in found.times.items()]
    rejected = [{"tile": list(tile), "reason": reason} for tile, reason in found.rejected.items()]
    return {
        "workload": found.workload, "rule": found.rule, "key": [str(part) for part in found.key],
        "given": list(found.given), "best": found.best and list(found.best), "row": found.row(), "times": times,
        "rejected": rejected,
    }  # fmt: skip
