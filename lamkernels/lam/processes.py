"""The processes of torchrun that share one command's work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from torch import distributed

PATIENCE = timedelta(days=30)  # of processes that are done for the others: torchrun ends them when one of these fails


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The processes of torchrun, where it started this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()
