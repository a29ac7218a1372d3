"""The memory measurement sees an N×K matrix where there is one."""

import sys

import pytest
from lamkernels.bench import runner
from lamkernels.bench.workloads import Workload

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_a_score_matrix_is_seen():
    workload = Workload("custom", "nearest_code", 20000, 1000, 8, measure="memory")  # N×K is 76 MiB
    ((dense, blocks),) = runner.run([workload], ["cdist", "eager"], runner.Settings())
    assert dense.status == blocks.status == "ok"
    assert dense.score_matrix_mb < dense.peak_extra_mb < 2.5 * dense.score_matrix_mb
    assert blocks.peak_extra_mb < 0.5 * blocks.score_matrix_mb
    assert dense.output_mb == pytest.approx(20000 * 8 / 2**20)
