"""``python -m bench.warm``: compiles what the other parts of ``python -m bench.gpu`` call, into the caches on disk.

On a new machine compilers take most of the time, each on one core, and what is timed must have the machine to itself.
So they run here first, several at a time, and nothing is timed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch

from . import profile_step, small_cases
from .providers import PROVIDERS
from .step_models import SIZES, Sizes
from .workloads import CODE_OPS, Workload, make_inputs, select

COMPILED = ("vqp-compile", "compile", "triton", "cuda")  # providers, those that take longest first
SCORES = 2**34  # bytes of the scores that a provider may hold here, since several processes share the memory


class Task(NamedTuple):
    """What one process compiles: a provider's workload, a project's training step, or the sanitizer's cases."""

    what: str
    workload: Workload | None = None
    sizes: Sizes | None = None


def tasks(device: str) -> list[Task]:
    """Everything that is compiled on a device, the longest first."""
    found = [Task(project, sizes=sizes) for project, sizes in SIZES.items()] + [Task("cases")]
    workloads = select(("lam", "tokenizer", "targets"), CODE_OPS, device)
    for name in COMPILED:
        provider = PROVIDERS[name]
        if not provider.absent(device):
            found += [
                Task(name, workload)
                for workload in workloads
                if workload.op in provider.prepare
                and workload.dtype in provider.dtypes
                and not provider.refuses(workload)
                and provider.score_bytes(workload) <= SCORES
            ]
    return found


def compile_one(task: Task, device: str) -> str:
    """Runs a task once; why it failed, or ""."""
    try:
        if task.workload is not None:
            inputs = make_inputs(task.workload, device)
            PROVIDERS[task.what].prepare[task.workload.op](task.workload, inputs)(0)
        elif task.sizes is not None:
            harness = profile_step.Harness(task.what, task.sizes, "stock", device)
            harness.compile()
            harness.step(harness.frames)
        elif small_cases.main(["--device", device]):
            return "a result is not finite"
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:  # the part that needs it says what is wrong with it
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    finally:
        torch._dynamo.reset()
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all tasks; 2 without a GPU that was asked for, 130 when interrupted."""
    device = small_cases.asked_device("bench.warm", argv)
    if not device:
        return 2
    todo, failed = tasks(device), 0
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            jobs = [pool.submit(compile_one, task, device) for task in todo]
            for task, job in zip(todo, jobs, strict=True):
                if reason := job.result():
                    failed += 1
                    print(f"{task.what} {task.workload.name if task.workload else ''}: {reason}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            return 130
        except BrokenProcessPool as error:  # a process was killed: what is left is compiled where it is called
            print(error, file=sys.stderr)
            return 1
    print(f"{len(todo) - failed} of {len(todo)} compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
