"""Rows and how they are shown: console table, JSON, CSV with a fixed schema, bar plot."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lamkernels
from lamkernels import info


@dataclass
class Row:
    """One provider on one workload: a line of the CSV.

    Attributes:
        suite: of the workload, as are op, N, K, D and dtype.
        device: "cpu" or "cuda".
        threads: that every provider had.
        provider: its name; ``kind`` is "ours", "baseline", "peer" or "floor", ``version`` that of its package.
        status: "ok"; "absent": not installed, or does not run here; "skipped": would not fit; "wrong": its result
            failed the check, so there is no time; "error": it raised, crashed or did not answer.
        note: why, where the status is not "ok"; "loss" for one of ours that is slower than the best peer.
        time_ms: the median over rounds of each round's median; on a GPU, time on the device.
        best_round_ms: the smallest of those medians.
        p10_ms: deciles of all calls, as is p90_ms.
        wall_ms: GPU only: from the call to the end of its work, seen from the host.
        graph_ms: GPU only: inside a CUDA graph; None where it cannot be captured.
        calls: how many were timed.
        speedup: time of the best peer / time_ms; below 1 is slower than the best peer.
        gflops: GF/s of the workload's operation model.
        gbytes_s: GB/s of its byte model.
        roofline: max(bytes / bandwidth, flops / peak) / time. Above 1 where the caches served what the model counts
            as memory traffic.
        bound: which of the two is larger, "memory" or "compute".
        bandwidth_gbs: measured in the provider's process, as is peak_gflops.
        checked_rows: rows compared with fp64.
        mismatch_rate: the share of them whose code is not the fp64 argmin.
        max_regret: their largest (d(index) − d(argmin)) / d(argmin).
        contract: every one of them meets the bound of precision="default".
        peak_extra_mb: memory suite: the high-water mark of a forward above what was there before, in MiB.
        output_mb: the part of it that the outputs take, in MiB.
        score_matrix_mb: what an N×K matrix of fp32 would take, in MiB.
    """

    suite: str
    op: str
    N: int
    K: int
    D: int
    dtype: str
    device: str
    threads: int
    provider: str
    kind: str
    version: str = ""
    status: str = ""
    note: str = ""
    time_ms: float | None = None
    best_round_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    wall_ms: float | None = None
    graph_ms: float | None = None
    calls: int | None = None
    speedup: float | None = None
    gflops: float | None = None
    gbytes_s: float | None = None
    roofline: float | None = None
    bound: str = ""
    bandwidth_gbs: float | None = None
    peak_gflops: float | None = None
    checked_rows: int | None = None
    mismatch_rate: float | None = None
    max_regret: float | None = None
    contract: bool | None = None
    peak_extra_mb: float | None = None
    output_mb: float | None = None
    score_matrix_mb: float | None = None


CONTEXT = ("hardware", "lamkernels", "torch", "commit", "date", "command")
COLUMNS = (*(f.name for f in fields(Row)), *CONTEXT)


def rank(rows: list[Row]) -> list[Row]:
    """Fills in ``speedup`` and marks losses, in the rows of one workload."""
    best = min((row.time_ms for row in rows if row.kind == "peer" and row.time_ms is not None), default=None)
    for row in rows:
        if best is not None and row.time_ms is not None and row.kind != "floor":
            row.speedup = best / row.time_ms
            if row.kind == "ours" and row.speedup < 1:
                row.note = "loss"
    return rows


def context(device: str, argv: Sequence[str]) -> dict[str, Any]:
    """Where, when and from what a measurement was made."""
    return {
        "device": device,
        "hardware": info.hardware(device),
        "cpu": info.cpu(),
        "gpus": info.gpus(),
        "versions": info.versions(),
        "lamkernels": lamkernels.__version__,
        "torch": info.versions()["torch"],
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["lamkernels", "bench", *argv]),
    }


def commit() -> str:
    """The commit of the checkout that is imported, with "-dirty" where tracked files other than results differ.

    Without a checkout, what LAMKERNELS_COMMIT says: a tree that was copied to the machine.
    """
    stated = os.environ.get("LAMKERNELS_COMMIT", "")
    root = Path(lamkernels.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:  # installed into someone else's repository
            return stated
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return stated


# the console


def title(row: Row) -> str:
    return f"{row.op}  N={row.N}  K={row.K}  D={row.D}  {row.dtype}"


def table(rows: Sequence[Row]) -> str:
    """The rows of one workload under a title."""
    memory = any(row.peak_extra_mb is not None for row in rows) or rows[0].suite == "memory"
    gpu = rows[0].device == "cuda"
    if memory:
        head = ["provider", "peak MiB", "outputs", "beyond outputs", "N×K matrix", "mismatch", "regret"]
    else:
        head = ["provider", "ms", "p10–p90", *(["wall ms", "graph ms"] if gpu else []), "vs best peer"]
        head += ["GF/s", "GB/s", "roofline", "mismatch", "regret"]
    lost = any(row.note == "loss" for row in rows)
    lines: list[list[str] | str] = [head]
    for row in rows:
        name = row.provider + (" *" if row.kind == "ours" else "")
        if row.status != "ok":
            lines.append(f"  {name:<14}{row.status}: {row.note}")
        elif memory:
            assert row.peak_extra_mb is not None and row.output_mb is not None and row.score_matrix_mb is not None
            sizes = (row.peak_extra_mb, row.output_mb, row.peak_extra_mb - row.output_mb, row.score_matrix_mb)
            lines.append([name, *(f"{size:.1f}" for size in sizes), *_accuracy(row)])
        else:
            assert row.p10_ms is not None and row.p90_ms is not None
            cells = [name, short(row.time_ms), f"{short(row.p10_ms)}–{short(row.p90_ms)}"]
            if gpu:
                cells += [short(row.wall_ms), short(row.graph_ms)]
            ratio = "" if row.speedup is None else f"{row.speedup:.2f}×"
            ratio += (" LOSS" if row.note == "loss" else "     ") if lost else ""
            fraction = "–" if row.roofline is None else f"{row.roofline:.0%}"
            cells += [ratio, short(row.gflops), short(row.gbytes_s), fraction, *_accuracy(row)]
            lines.append(cells)
    widths = [max(len(line[i]) for line in lines if not isinstance(line, str)) for i in range(len(head))]
    widths[0] = max(widths[0], 14)
    text = [title(rows[0]) + (f"  ({bound}-bound)" if (bound := _bound(rows)) else "")]
    for line in lines:
        if isinstance(line, str):
            text.append(line)
        else:
            cells = [
                line[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
            ]
            text.append("  " + "  ".join(cells).rstrip())
    return "\n".join(text)


def _bound(rows: Iterable[Row]) -> str:
    return next((row.bound for row in rows if row.bound), "")


def _accuracy(row: Row) -> list[str]:
    if row.max_regret is None:
        return ["–", "–"]
    return [mismatch(row), "0" if row.max_regret == 0 else f"{row.max_regret:.0e}"]


def mismatch(row: Row) -> str:
    """The mismatch rate in two digits, "–" without a lookup."""
    if row.mismatch_rate is None:
        return "–"
    return "0" if row.mismatch_rate == 0 else f"{row.mismatch_rate:.1e}"


def short(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "–"
    places = next((places for limit, places in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if value >= limit), 4)
    return f"{value:.{places}f}"


def summary(rows: Sequence[Row]) -> str:
    """What to remember: for each of our providers, how often it beat the best peer, and where it lost."""
    lines = []
    for name in dict.fromkeys(row.provider for row in rows if row.kind == "ours"):
        raced = [row for row in rows if row.provider == name and row.speedup is not None]
        losses = [row for row in raced if row.note == "loss"]
        if raced:
            lines.append(f"{name}: at least as fast as the best peer in {len(raced) - len(losses)} of {len(raced)}")
        lines += [f"  loss  {title(row)}: {row.speedup:.2f}× the speed of the best peer" for row in losses]
    failed = [row for row in rows if row.status in ("wrong", "error")]
    lines += [f"{row.provider} {row.status}  {title(row)}: {row.note}" for row in failed]
    return "\n".join(lines)


# files


def write_json(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    replace_file(
        path, (json.dumps({"context": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n").encode()
    )


def write_csv(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """One line per row, in the columns :data:`COLUMNS`; an empty cell is a value that was not measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {**asdict(row), **{name: about[name] for name in CONTEXT}}
        writer.writerow({name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in cells.items()})
    replace_file(path, text.getvalue().encode())


def write_plot(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Bars of time, or of peak memory, with a panel per workload; providers without a result are named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(title(row), []).append(row)
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    height = 0.8 + 0.24 * max(len(group) for group in groups.values())
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5.2 * columns, height * lines + 0.6), squeeze=False, layout="constrained"
    )
    colors = {"ours": "#c44e52", "baseline": "#999999", "floor": "#cccccc", "peer": "#4c72b0"}
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (name, group) in zip(axes.flat, groups.items(), strict=False):
        memory = any(row.peak_extra_mb is not None for row in group)
        values = [(row.peak_extra_mb if memory else row.time_ms) or 0.0 for row in group]
        bars = axis.barh([row.provider for row in group], values, color=[colors[row.kind] for row in group])
        labels = [short(value) if row.status == "ok" else row.status for row, value in zip(group, values, strict=True)]
        axis.bar_label(bars, labels, padding=3, fontsize=7)
        if any(values):
            axis.set_xscale("log")
            smallest, largest = min(v for v in values if v), max(values)
            axis.set_xlim(smallest / 3, largest * 4)
            axis.xaxis.set_major_locator(LogLocator(numticks=5))
            axis.xaxis.set_minor_formatter(NullFormatter())  # its labels would lie on one another
        axis.invert_yaxis()
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("peak extra MiB" if memory else "ms, log scale", fontsize=7)
    versions = f"lamkernels {about['lamkernels']} {about['commit']}, torch {about['torch']}"
    figure.suptitle(f"{about['hardware']} · {rows[0].threads} threads · {versions} · {about['date']}", fontsize=9)
    image = io.BytesIO()
    kind = path.suffix.lstrip(".") or "png"
    figure.savefig(image, format=kind, dpi=130)
    pyplot.close(figure)
    replace_file(path, image.getvalue())


def rows_of(content: dict[str, Any]) -> list[Row]:
    """The rows of what :func:`write_json` wrote; a field that a later version added is left at its default."""
    known = {field.name for field in fields(Row)}
    return [Row(**{name: cell for name, cell in row.items() if name in known}) for row in content.get("rows", ())]


def kept(path: Path, about: dict[str, Any]) -> list[Row]:
    """What the same command gave on the same machine and commit, less the workloads in which one of ours failed."""
    try:
        content = json.loads(path.read_text())
        known = ("device", "hardware", "torch", "commit", "command")
        same = all(content["context"][name] == about[name] for name in known)
        rows = rows_of(content)
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or of another kind
        return []
    if not same or not about["commit"] or about["commit"].endswith("-dirty"):
        return []
    failed = {workload_of(row) for row in rows if row.kind == "ours" and row.status in ("error", "wrong")}
    return [row for row in rows if workload_of(row) not in failed]


def workload_of(row: Row) -> tuple[str, str]:
    """The suite and the name of a row's workload."""
    return row.suite, f"{row.op} N={row.N} K={row.K} D={row.D} {row.dtype}"


def replace_file(path: Path, content: bytes) -> None:
    """Writes under another name and renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
