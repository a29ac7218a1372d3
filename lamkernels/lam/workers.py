"""The rows of an experiment, made by several processes of one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from lamkernels.lam import commands

P = TypeVar("P")
R = TypeVar("R")

_run: Callable[[Any], Any]  # of this process, where it is a worker


def each(run: Callable[[P], R], points: Sequence[P], processes: int = 1) -> Generator[tuple[P, R]]:
    """Each point with its result, as soon as it is there.

    Close the iterator where it is not exhausted: what is still running then ends at once, as it does when this process
    ends in any way.

    Args:
        run: makes a result on one thread, and depends on nothing but the point; to be pickled, once for each process.
        points: to be pickled, no two equal.
        processes: that make results; 1 makes them here, in the order of the points.

    Raises:
        ChildProcessError: a process was killed.
    """
    processes = min(processes, len(points))
    if processes <= 1:
        with commands.one_thread():
            for point in points:
                yield point, run(point)
        return
    context = multiprocessing.get_context("spawn")  # MuJoCo, OpenMP and CUDA do not survive a fork
    alive, held = context.Pipe(duplex=False)
    with alive, held:
        pool = ProcessPoolExecutor(processes, context, _start, (run, alive))
        try:
            with _no_interrupt():
                made = {pool.submit(_work, point): point for point in points}
            for future in as_completed(made):
                yield made[future], future.result()
        except BaseException as error:
            held.close()
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "a worker process was killed, for want of memory perhaps: try fewer --processes"
                ) from error
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits for the end; processes that start inside never see it: they are ended by the one that does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(run: Callable[[Any], Any], alive: Connection) -> None:
    global _run
    _run = run
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    """Ends this process, in the middle of a row, when nobody holds the other end of the pipe."""
    with contextlib.suppress(EOFError):
        alive.recv()
    os._exit(1)


def _work(point: Any) -> Any:
    return _run(point)
