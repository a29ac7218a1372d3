"""The kernels run on torch's threads, beside them, in many Python threads, and in child processes."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lamkernels as lk
from lamkernels.ops import parallel


def large() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(30000, 32), torch.randn(64, 32)


def test_torch_has_the_openmp_runtime_that_is_asked_for():
    if not torch.backends.openmp.is_available():
        pytest.skip("this torch has no OpenMP")
    assert parallel._gomp_parallel() is not None
    assert "torch's OpenMP runtime" in parallel.threading()


def test_every_task_runs_once_on_any_number_of_threads(monkeypatch):
    x, codebook = large()
    expected = lk.vector_quantize(x, codebook, backend="numba")
    monkeypatch.setattr(parallel, "_gomp_parallel", lambda: None)  # a torch without OpenMP
    for mine, theirs in zip(lk.vector_quantize(x, codebook, backend="numba"), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("threads", [2, 3])
def test_as_many_threads_as_torch_has(monkeypatch, threads):
    x, codebook = large()
    used, before = [], torch.get_num_threads()
    run = parallel._gomp_parallel()
    monkeypatch.setattr(parallel, "_gomp_parallel", lambda: lambda *args: (used.append(args[2]), run(*args)))
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            lk.vector_quantize(x, codebook, backend="numba")
    finally:
        torch.set_num_threads(before)
    assert used == [threads]  # with one thread OpenMP is not asked


def test_concurrent_python_threads_beside_torch():
    x, codebook = large()
    expected = lk.nearest_code(x, codebook, backend="numba")

    def work(i):
        torch.mm(x[:2000], codebook.T)
        return lk.nearest_code(x, codebook, backend="numba")

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, expected) for result in pool.map(work, range(24)))


CHILD = """
import sys, torch, lamkernels as lk
from torch.utils.data import DataLoader, Dataset
torch.manual_seed(0)
x, codebook = torch.randn(30000, 32), torch.randn(64, 32)
expected = lk.nearest_code(x, codebook, backend="numba")  # starts the threads that fork does not copy

class Frames(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        torch.set_num_threads(2)  # the worst case: a worker starts with one
        return lk.nearest_code(x, codebook, backend="numba")

if __name__ == "__main__":
    loader = DataLoader(Frames(), batch_size=1, num_workers=2, multiprocessing_context=sys.argv[1])
    assert all(torch.equal(batch[0], expected) for batch in loader)
    print("ok")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    result = subprocess.run([sys.executable, script, method], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "ok", result.stderr
