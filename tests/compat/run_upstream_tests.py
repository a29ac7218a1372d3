"""Runs a copy of vector-quantize-pytorch's own tests with the fused classes in the place of the package's.

    python -m tests.compat.run_upstream_tests PATH [--stock]

PATH is the tests folder of a checkout of github.com/lucidrains/vector-quantize-pytorch, or files of it; --stock runs
the installed package alone, for comparison. A test that called code of the package instead of a fused form is counted
as delegated. The last line counts; the lines before name each test that failed, and why.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import vector_quantize_pytorch as upstream

from lamkernels.compat import vector_quantize_pytorch as ours
from lamkernels.compat.vector_quantize_pytorch import _codebook, _upstream

CLASSES = ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "FSQ", "ResidualFSQ", "LFQ", "SimVQ")


def substitute() -> dict[str, SimpleNamespace]:
    """Puts the fused classes into every module of the package that names one of them; returns what was there."""
    names = ["", *(f".{module.name}" for module in pkgutil.iter_modules(upstream.__path__))]
    before = {}
    for name in names:
        module = importlib.import_module(upstream.__name__ + name)
        before[name[1:]] = SimpleNamespace(**vars(module))
    for module in (sys.modules[upstream.__name__ + name] for name in names):
        for name in CLASSES:
            if hasattr(module, name):
                setattr(module, name, getattr(ours, name))
    return before


class Recorder:
    """Which tests passed, which of these called upstream's code, and why the others failed."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.delegated: list[str] = []
        self.failed: dict[str, str] = {}
        self.calls = 0

    def watch(self, package: dict[str, SimpleNamespace]) -> None:
        """Counts what leaves the fused code, and takes it to the package as it was."""

        def load(what: str, module: str) -> SimpleNamespace:
            self.calls += 1
            return package[module]

        for owner in (_upstream, _codebook):
            vars(owner)["load"] = load

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.calls = 0
        yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid] = (crash.message if crash else str(report.longrepr)).splitlines()[0]
        elif report.when == "call" and report.passed:
            (self.delegated if self.calls else self.passed).append(report.nodeid)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="+", type=Path, help="the tests of a checkout")
    parser.add_argument("--stock", action="store_true", help="do not substitute")
    options = parser.parse_args()
    recorder = Recorder()
    if not options.stock:
        recorder.watch(substitute())
    paths = [str(path.resolve()) for path in options.path]
    # from their own folder: this project's settings and fixtures are not theirs
    folder = options.path[0] if options.path[0].is_dir() else options.path[0].parent
    rest = ["-q", "-p", "no:cacheprovider", "--tb=line", "--rootdir", str(folder.resolve()), "-c", "/dev/null"]
    pytest.main([*paths, *rest], plugins=[recorder])
    for name, reason in recorder.failed.items():
        print(f"failed: {name}: {reason}")
    for name in recorder.delegated:
        print(f"delegated: {name}")
    print(f"{len(recorder.passed)} passed, {len(recorder.delegated)} delegated, {len(recorder.failed)} failed")
    return 1 if recorder.failed else 0


if __name__ == "__main__":
    sys.exit(main())
