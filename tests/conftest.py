"""What every test shares: the backends that run here, and unwritten memory that shows."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lamkernels as lk

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses products in deterministic mode
if importlib.util.find_spec("lamkernels.bench") is None:  # a checkout that is not installed: bench/ lies beside
    lk.__path__.append(str(Path(__file__).parents[1]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend`` runs a test on every backend that takes CPU tensors here."""
    if "backend" in metafunc.fixturenames:
        status = lk.available_backends()
        names = [name for name in ("reference", "numba") if status[name].available]
        metafunc.parametrize("backend", names)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch fills the memory that ``torch.empty`` returns with NaN and the largest integers: no output is left out."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small matrices: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
