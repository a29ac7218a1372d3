"""The whole folder needs TRITON_INTERPRET=1 before Triton is imported, so it runs in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.interpreter)
            # the minimum of the scores of a NaN row; NumPy warns where a GPU is silent
            item.add_marker(pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"))
            if os.environ.get("TRITON_INTERPRET") != "1":
                item.add_marker(
                    pytest.mark.skip(reason="start the process with TRITON_INTERPRET=1 to run the interpreter")
                )


@pytest.fixture(autouse=True)
def _silent_overflow() -> Iterator[None]:
    """NumPy warns where a GPU is silent: the kernels overflow on purpose and decide such rows again in fp64."""
    with np.errstate(all="ignore"):
        yield
