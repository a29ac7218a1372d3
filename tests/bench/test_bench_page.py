"""docs/benchmarks.md is what the committed results say, losses and absences included."""

import dataclasses
import json

import pytest
from lamkernels.bench import page
from lamkernels.bench.report import Row, context, rank


def test_the_committed_page_is_that_of_the_committed_results():
    docs = page.RESULTS.parents[1] / "docs"
    if not docs.is_dir():
        pytest.skip("an installed package has no docs")
    assert (docs / "benchmarks.md").read_text() == page.render(page.RESULTS, docs), (
        "run: lamkernels bench --page docs/benchmarks.md"
    )


def row(provider, kind, device="cuda", **measured):
    return Row("lam", "nearest_code", 256, 8, 32, "float32", device, 2, provider, kind, **measured)


def write(folder, rows, device):
    about = {**context("cpu", ["--suite", "lam"]), "device": device, "hardware": folder.parent.name}
    folder.mkdir(parents=True)
    rows = [{**dataclasses.asdict(row), "a_field_of_a_later_version": 1} for row in rows]
    (folder / "bench.json").write_text(json.dumps({"context": about, "rows": rows}))


def test_losses_absences_and_mismatches_are_shown(tmp_path):
    pytest.importorskip("matplotlib")
    timed = {"status": "ok", "p10_ms": 0.9, "p90_ms": 2.5, "bound": "memory", "contract": True}
    rows = rank([
        row("triton", "ours", time_ms=2.0, roofline=0.25, mismatch_rate=0.0, wall_ms=3.0, graph_ms=1.5, **timed),
        row("eager", "peer", time_ms=1.0, roofline=0.5, mismatch_rate=1e-4, **timed),
        row("flash-kmeans", "peer", status="absent", note="flash_kmeans is not installed"),
    ])  # fmt: skip
    results = tmp_path / "bench" / "results"
    write(results / "Some CPU" / "lam", [row("numba", "ours", "cpu", time_ms=1.0, roofline=0.5, **timed)], "cpu")
    write(results / "Some GPU" / "tests", [], "cuda")  # a run that measured nothing
    assert "Not yet measured on a GPU" in page.render(results, tmp_path)
    write(results / "Some GPU" / "lam", rows, "cuda")
    (results / "Some GPU" / "info.json").write_text(json.dumps({"command": "lamkernels info --json"}))
    drawn = page.write(tmp_path / "docs" / "page.md", results)
    shown = (tmp_path / "docs" / "page.md").read_text()
    assert drawn == [results / name / "lam" / "bench.png" for name in ("Some CPU", "Some GPU")]
    assert "Not yet measured" not in shown and shown.index("## Some GPU") < shown.index("## Some CPU")
    assert "| **triton** | 2.00 | 0.900–2.50 | 3.00 | 1.50 | 0.50× LOSS | 25% | memory | 0 | kept |" in shown
    assert "| eager | 1.00 | 0.900–2.50 | – | – | 1.00× | 50% | memory | 1.0e-04 | kept |" in shown
    assert "| flash-kmeans | absent: flash_kmeans is not installed |" in shown
    assert "- loss nearest_code" in " ".join(shown.split()) and "lamkernels bench --suite lam\n" in shown
    assert "[plot](../bench/results/Some GPU/lam/bench.png)" in shown
    assert "| [info.json](../bench/results/Some GPU/info.json) | `lamkernels info --json` |" in shown
    assert page.write(tmp_path / "docs" / "page.md", results) == []  # what is there is not drawn again
    assert (tmp_path / "docs" / "page.md").read_text() == shown
