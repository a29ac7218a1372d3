"""Rows made by several processes: the same numbers, one error, and nothing left running."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time

import pytest

from lamkernels.lam import commands, frame_experiments
from lamkernels.lam.frame_scenes import GameData
from lamkernels.lam.frame_training import TrainingConfig
from lamkernels.lam.workers import each


def test_no_bit_of_a_row_depends_on_how_many_processes_make_them(tmp_path):
    pytest.importorskip("ale_py", reason="ale-py is not installed: pip install 'lamkernels[demo]'")
    controls = frame_experiments.FrameControls(
        GameData("pong", transitions=100, ratio=(1.0, 4.0)), width=2, seeds=(0,),
        training=TrainingConfig(steps=3, batch_size=16),
    )  # fmt: skip
    journal = tmp_path / "rows.jsonl"
    expected = frame_experiments.rows_of(controls, folder=tmp_path)
    assert frame_experiments.rows_of(controls, journal, folder=tmp_path, processes=2) == expected
    assert journal.read_text().count("\n") == 1 + len(expected) == 1 + 2 * 3


@pytest.mark.parametrize(
    ("run", "points", "error", "message"),
    [
        (time.sleep, [0.0, -1.0, 600.0], ValueError, "sleep length must be non-negative"),
        (os._exit, [3, 3], ChildProcessError, "a worker process was killed, for want of memory perhaps"),
    ],
    ids=["failed", "killed"],
)
def test_an_error_of_one_process_is_raised_here_and_ends_the_others(run, points, error, message):
    start = time.monotonic()
    with pytest.raises(error, match=message), contextlib.closing(each(run, points, 2)) as made:
        for point, _ in made:
            assert point == 0
    assert time.monotonic() - start < 60 and not multiprocessing.active_children()


def test_a_gpu_has_one_process_and_no_command_has_none():
    assert commands.processes_of(None, "cuda") == 1 <= commands.processes_of(None) <= commands.MOST_PROCESSES
    with pytest.raises(ValueError, match="--processes is 0; it must be at least 1"):
        commands.processes_of(0)
