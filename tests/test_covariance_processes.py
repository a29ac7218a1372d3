"""The accumulator across processes: reduced over ranks, within a limit of memory, and killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

from lamkernels import lam
from lamkernels.covariance import Covariance

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork and spawn, not ours


def episodes(rank):
    """Rows of a rank and the starts of its episodes; the second rank has none."""
    count = 0 if rank == 1 else 30 + 10 * rank
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, 3, generator=generator) + rank, torch.arange(count) % 11 == 0


def numbers(cov):
    mean = torch.cat([cov.mean, cov.mean_y, torch.tensor([cov.count, cov.weight])])
    return torch.cat([mean, *(m.flatten() for m in (cov.covariance(), cov.cross_covariance(), cov.covariance_y()))])


def reduce_on(rank, world, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    rows, starts = episodes(rank)
    cov = Covariance(3, lag=1).update(rows[:20], starts=starts[:20])
    result = {"first": numbers(cov.all_reduce()), "twice": numbers(cov.all_reduce().all_reduce())}
    cov.update(rows[20:], starts=starts[20:])
    result["between"] = numbers(cov)
    resumed = Covariance(3, lag=1).load_state_dict(cov.state_dict())
    result |= {"later": numbers(cov.all_reduce()), "resumed": numbers(resumed.all_reduce())}
    pair = distributed.new_group([0, world - 1])
    part = Covariance(3, lag=1).update(rows, starts=starts)
    part.all_reduce(pair)
    result["pair"] = numbers(part) if part.count else torch.empty(0)
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_hold_the_bits_of_merging_in_order(world, tmp_path):
    multiprocessing.spawn(reduce_on, (world, tmp_path), nprocs=world)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]

    def merged(ranks, part):
        parts = [episodes(rank) for rank in ranks]
        first, *others = (Covariance(3, lag=1).update(rows[part], starts=starts[part]) for rows, starts in parts)
        for other in others:
            first.merge(other)
        return first

    everyone = range(world)
    expected = {"first": numbers(merged(everyone, slice(20)))}
    expected["twice"] = expected["first"]
    whole = numbers(merged(everyone, slice(None)))
    pair = numbers(merged([0, world - 1], slice(None)))
    for rank, result in enumerate(results):
        assert torch.equal(result["first"], expected["first"]) and torch.equal(result["twice"], expected["first"])
        assert torch.equal(result["later"], results[0]["later"]) and torch.equal(result["resumed"], result["later"])
        torch.testing.assert_close(result["later"], whole, rtol=1e-7, atol=1e-9)
        rows, starts = episodes(rank)
        own = Covariance(3, lag=1).update(rows[20 - (rank != 1) :], starts=starts[20 - (rank != 1) :])
        torch.testing.assert_close(
            result["between"], numbers(merged(everyone, slice(20)).merge(own)), rtol=1e-6, atol=1e-7
        )
        if rank in (0, world - 1):
            assert torch.equal(result["pair"], pair)
        else:
            assert len(result["pair"]) == 0


def test_without_processes_nothing_happens():
    cov = Covariance(3).update(torch.randn(9, 3))
    before = cov.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in cov.all_reduce().state_dict().items())


STREAM = """
import resource, torch
from lamkernels.covariance import Covariance
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
cov, batch = Covariance(64, lag=1), torch.randn(50_000, 64)
for _ in range(4): cov.update(batch)  # compiled, all buffers in use
before = peak()
soft = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
for _ in range(96): cov.update(batch)
assert cov.count == 5_000_000 - 1
print(peak() - before)
"""


def test_a_stream_larger_than_the_memory():
    result = subprocess.run([sys.executable, "-c", STREAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 2**27, "bytes beside those of the first blocks, after 1.2 GiB of rows"


CHECKPOINTS = """
import sys, pathlib, torch
from lamkernels.covariance import Covariance
path, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
rows = torch.randn(last, 3, generator=torch.Generator().manual_seed(0))
cov = Covariance(3)
if path.exists(): cov.load(path)
while cov.count < last:
    cov.update(rows[cov.count : cov.count + 7])
    cov.save(path)
    print(cov.count, flush=True)
"""


def test_killed_in_a_loop_of_checkpoints_it_goes_on_with_the_same_bits(tmp_path):
    path, last = tmp_path / "state.safetensors", 2100
    command, reached = [sys.executable, "-c", CHECKPOINTS, str(path), str(last)], []
    for lines in (1, 13, None):  # killed twice, while it writes or computes
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            reached.append(int(line))
            lines = lines and lines - 1
            if lines == 0:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == (0 if lines is None else -signal.SIGKILL)
    rows = torch.randn(last, 3, generator=torch.Generator().manual_seed(0))
    undisturbed, resumed = Covariance(3).update(rows), Covariance(3).load(path)
    assert reached[0] == 7 and resumed.count == last
    assert torch.equal(undisturbed.mean, resumed.mean) and torch.equal(undisturbed.covariance(), resumed.covariance())


def test_files(tmp_path):
    cov = Covariance({"o": 3, "a": 1}, lag=2).update({"o": torch.randn(9, 3), "a": torch.randn(9, 1)})
    path = tmp_path / "folder" / "state.safetensors"
    cov.save(path)
    assert torch.equal(Covariance({"o": 3, "a": 1}, lag=2).load(str(path)).covariance_y(), cov.covariance_y())
    assert lam.files.load_tensors(path)[1] == {"format": "lamkernels covariance"}
    with pytest.raises(ValueError, match="lag is 2, not None"):
        Covariance({"o": 3, "a": 1}).load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        cov.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        cov.load(tmp_path / "none")
