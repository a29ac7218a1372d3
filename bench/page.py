"""``lamkernels bench --page docs/benchmarks.md``: the committed results as one page, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Row, mismatch, replace_file, rows_of, short, summary, title, write_plot

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = """# Benchmarks

Written by `lamkernels bench --page docs/benchmarks.md` from the files under `bench/results/`; not edited by hand.

Every time is a median, in milliseconds, of calls that took turns with those of the other providers, each in a process
of its own. Before that the result was compared with fp64: `mismatch` is the share of rows whose code is not the fp64
argmin, and `contract` says whether every row keeps the bound of [numerics.md](numerics.md), for covariances theirs.
`roofline` is the share of what the machine allows: max(bytes / bandwidth, operations / rate) over the time, with both
ceilings measured in the same process; above 100 % the caches served what the model counts as memory traffic, or the
kernel outran torch's product, by which the rate is measured. `vs best peer` is the best peer's time over that of the
row. Ours are **bold**; a row of ours behind a peer says LOSS, and a provider that could not run says why. `harness` is
what the harness of a training step costs by itself: every other row has it in its time.
"""
NO_GPU = """## GPUs

**Not yet measured on a GPU.** No folder under `bench/results/` holds a result of one. On a machine that has one,
`python -m bench.gpu` runs everything and writes it there ([gpu.md](gpu.md)). What the byte and flop model allows on an
H200, A100, MI300X, ... is `lamkernels bench --estimate H200`; it is a bound, not a measurement.
"""


def render(results: Path, base: Path) -> str:
    """The page for the folder of results, with links relative to the folder ``base``."""
    devices = [_Device(folder, base) for folder in sorted(results.iterdir()) if folder.is_dir()]
    gpus, others = ([d for d in devices if d.gpu == wanted] for wanted in (True, False))
    return "\n".join([HEAD, *([] if gpus else [NO_GPU]), *(device.section() for device in (*gpus, *others))])


def write(path: Path, results: Path = RESULTS) -> list[Path]:
    """Writes the page; where matplotlib is installed, first draws the plots that are missing beside the results.

    Returns:
        the plots that were drawn.
    """
    drawn = []
    if importlib.util.find_spec("matplotlib") is not None:
        for found in sorted(results.glob("*/**/*.json")):
            content, plot = _load(found), found.with_suffix(".png")
            if rows_of(content) and not plot.exists():
                write_plot(plot, rows_of(content), content["context"])
                drawn.append(plot)
    replace_file(path, render(results, path.parent.resolve()).encode())
    return drawn


class _Device:
    """One folder of results."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.files = {path: _load(path) for path in sorted(folder.rglob("*.json"))}
        about = [content["context"] for content in self.files.values() if "context" in content]
        self.hardware = about[0]["hardware"] if about else folder.name
        measured = [content for content in self.files.values() if rows_of(content)]
        self.gpu = any(content["context"].get("device") == "cuda" for content in measured)

    def section(self) -> str:
        measured = {path: content for path, content in self.files.items() if rows_of(content)}
        lines = [f"## {self.hardware}", ""]
        for path, content in measured.items():
            lines += [f"### {path.parent.relative_to(self.folder)}", "", *self._about(path, content), ""]
            lines += [*_table(rows_of(content)), ""]
        others = [path for path in self.files if path not in measured]
        if others:
            lines += ["### Other results", "", "| result | command | commit | date |", "|---|---|---|---|"]
            for path in others:
                content = self.files[path]
                context = content.get("context", content)
                command = f"`{context['command']}`" if "command" in context else ""
                name = path.relative_to(self.folder)
                cells = [self._link(str(name), path), command, context.get("commit", ""), context.get("date", "")]
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
        return "\n".join(lines)

    def _about(self, path: Path, content: dict[str, Any]) -> list[str]:
        context, rows = content["context"], rows_of(content)
        kinds = {".json": "JSON", ".csv": "CSV", ".png": "plot"}
        links = [
            self._link(kind, path.with_suffix(end)) for end, kind in kinds.items() if path.with_suffix(end).exists()
        ]
        versions = {name: version for name, version in context["versions"].items() if version}
        peers = {row.provider: row.version for row in rows if row.kind == "peer" and row.version}
        others = [f"{name} {version}" for name, version in peers.items() if version not in versions.values()]
        own = f"lamkernels {context['lamkernels']}, commit {context['commit'] or 'unknown'}, {context['date']}"
        theirs = ", ".join(
            [*(f"{name} {version}" for name, version in versions.items() if name != "lamkernels"), *others]
        )
        lines = [f"{own}; {rows[0].threads} threads; {', '.join(links)}", "", "```bash", context["command"], "```", ""]
        lines += [f"With {theirs}.", ""]
        lines += [f"- {line.strip()}" for line in summary(rows).split("\n") if line]
        return lines if lines[-1] else lines[:-1]

    def _link(self, text: str, path: Path) -> str:
        return f"[{text}]({os.path.relpath(path, self.base)})"


def _load(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) else {}


def _table(rows: Sequence[Row]) -> list[str]:
    gpu = rows[0].device == "cuda"
    memory = [row for row in rows if row.suite == "memory" or row.peak_extra_mb is not None]
    timed = [row for row in rows if row not in memory]
    lines = []
    if timed:
        head = ["workload", "provider", "ms", "p10–p90", *(["wall ms", "graph ms"] if gpu else [])]
        head += ["vs best peer", "roofline", "bound by", "mismatch", "contract"]
        lines += _markdown(head, timed, lambda row: _timed_cells(row, gpu))
    if memory:
        head = ["workload", "provider", "peak MiB", "beyond outputs, MiB", "N×K matrix, MiB", "mismatch", "contract"]
        lines += [*([""] if lines else []), *_markdown(head, memory, _memory_cells)]
    return lines


def _markdown(head: Sequence[str], rows: Sequence[Row], cells: Any) -> list[str]:
    lines, last = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"], ""
    for row in rows:
        name = title(row).replace("  ", " ")
        provider = f"**{row.provider}**" if row.kind == "ours" else row.provider
        values = cells(row) if row.status == "ok" else [f"{row.status}: {row.note}".replace("|", "\\|")]
        values += [""] * (len(head) - 2 - len(values))
        lines.append("| " + " | ".join([name if name != last else "", provider, *values]) + " |")
        last = name
    return lines


def _timed_cells(row: Row, gpu: bool) -> list[str]:
    ratio = "–" if row.speedup is None else f"{row.speedup:.2f}×" + (" LOSS" if row.note == "loss" else "")
    roofline = "–" if row.roofline is None else f"{row.roofline:.0%}"
    walls = [short(row.wall_ms), short(row.graph_ms)] if gpu else []
    spread = f"{short(row.p10_ms)}–{short(row.p90_ms)}"
    return [short(row.time_ms), spread, *walls, ratio, roofline, row.bound, *_accuracy(row)]


def _memory_cells(row: Row) -> list[str]:
    beyond = None if row.peak_extra_mb is None or row.output_mb is None else max(0.0, row.peak_extra_mb - row.output_mb)
    return [short(row.peak_extra_mb), short(beyond), short(row.score_matrix_mb), *_accuracy(row)]


def _accuracy(row: Row) -> list[str]:
    return [mismatch(row), "–" if row.contract is None else "kept" if row.contract else "broken"]
