"""What the commands share: options, one thread, the device, files, exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

MOST_PROCESSES = 8  # without being asked: each has frames of its own


def parser(module: str, description: str, out: str, names: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Options ``--out`` and ``--quick`` of ``python -m module`` and, of several experiments, their names.

    Args:
        module: that is run.
        description: what it writes.
        out: the default folder.
        names: of the experiments; the parsed ``names`` are some of them, all where none is given.
    """
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    if names:

        def name(text: str) -> str:
            if text not in names:
                allowed = ", ".join(map(repr, names))
                raise argparse.ArgumentTypeError(f"NAME is {text!r}; it must be one of {allowed}")
            return text

        made.add_argument(
            "names", nargs="*", type=name, default=tuple(names), metavar="NAME",
            help=f"{', '.join(names)}; default: all",
        )  # fmt: skip
    made.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help="default: %(default)s")
    made.add_argument("--quick", action="store_true", help="fewer points, seeds, samples and steps")
    return made


def add_processes(made: argparse.ArgumentParser) -> None:
    """The option ``--processes``; :func:`processes_of` says what it means."""
    made.add_argument(
        "--processes", type=int, metavar="P",
        help=f"that train models, one each at a time; no number depends on it; default: one for each core that torch "
        f"uses, up to {MOST_PROCESSES}, and one for a GPU",
    )  # fmt: skip


def processes_of(asked: int | None, device: str = "cpu") -> int:
    """How many processes make the rows of an experiment, on one thread each.

    Raises:
        ValueError: fewer than one are asked for.
    """
    if asked is None:
        return min(torch.get_num_threads(), MOST_PROCESSES) if device == "cpu" else 1
    if asked < 1:
        raise ValueError(f"--processes is {asked}; it must be at least 1")
    return asked


class RenderingError(RuntimeError):
    """Nothing can be rendered on this machine; the message says what to install."""


def status(made: argparse.ArgumentParser, work: Callable[[], None]) -> int:
    """Works, and returns the exit status: what is missing, wrong or cannot be written is one line on stderr."""
    try:
        work()
    except (ModuleNotFoundError, OSError, RenderingError, ValueError) as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def need(*modules: str, what: str = "the experiments", extra: str = "demo") -> None:
    """Before the work, not after it.

    Args:
        modules: that ``what`` needs.
        what: needs them.
        extra: of the package, that installs them.

    Raises:
        ModuleNotFoundError: one of the modules is not installed.
    """
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        raise ModuleNotFoundError(f"{what} need {' and '.join(absent)}; pip install 'lamkernels[{extra}]'")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: small matrices gain nothing from more, and sums have one order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def device_named(name: str) -> torch.device:
    """The device of ``--device``, ready for reproducible work.

    Raises:
        ValueError: there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}; it must be cpu or cuda[:N]") from error
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        if not torch.cuda.is_available():
            raise ValueError(f"--device is {name!r}, but torch {torch.__version__} finds no GPU; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device is {name!r}; this machine has {torch.cuda.device_count()} GPUs")
    elif device.type != "cpu":
        raise ValueError(f"--device is {name!r}; it must be cpu or cuda[:N]")
    return device
