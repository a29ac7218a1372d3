"""What an import costs and loads, and what the distributions hold."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "triton",
    "cupy",
    "numba",
    "matplotlib",
    "ale_py",
    "safetensors",
    "tqdm",
    "jinja2",
    "scipy",
    "av",
    "pyarrow",
)


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_nothing_heavy():
    loaded = f"set({OPTIONAL}) & (set(sys.modules) - before)"
    code = f"import sys, torch; before = set(sys.modules); import lamkernels; print({loaded})"
    assert python(code).strip() == "set()"


def test_import_and_reference_work_without_the_optional_packages():
    code = f"""
import sys
for name in {OPTIONAL}: sys.modules[name] = None
import torch, lamkernels as lk
print(lk.nearest_code(torch.eye(3), torch.eye(3)).tolist(), lk.available_backends()["numba"])
try: lk.nearest_code(torch.eye(3), torch.eye(3), backend="numba")
except RuntimeError as error: print(error)
"""
    out = python(code)
    assert "[0, 1, 2]" in out and "pip install numba" in out and "backend 'numba' cannot run here" in out


def test_import_time_beyond_torch(tmp_path):
    code = "import time, torch; t = time.process_time(); import lamkernels; print(time.process_time() - t)"
    # a place for bytecode, as an installed package has: without one every import compiles the sources again
    cache = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    assert min(float(python(code, **cache)) for _ in range(5)) < 0.1


@pytest.mark.slow
def test_distributions_hold_what_they_should(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for name in ("py.typed", "csrc/README.md", "ops/nearest_code/triton.py", "bench/cli.py", "lam/demo.py"):
        assert f"lamkernels/{name}" in wheel, name
    assert not [name for name in wheel if name.startswith(("tests", "csrc", "bench")) or "results" in name]
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        sdist = archive.getnames()
    assert not [name for name in wheel if "/test_" in name]
    inside = {name.partition("/")[2] for name in sdist}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    wanted = tracked or ["csrc/README.md", "LICENSE", "tests/contract.py", "docs/numerics.md", "Makefile"]
    assert not [name for name in wanted if name not in inside and name != ".gitignore"]
