"""W processes train as one on the joined batch: averages, k-means, dead codes, entropies; with real gloo processes."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

from lamkernels.compat import vector_quantize_pytorch as ours

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork and spawn, not ours

CASES = {
    "averages": {},
    "dead codes": {"threshold_ema_dead_code": 2, "use_cosine_sim": True},
    "k-means": {"kmeans_init": True, "threshold_ema_dead_code": 1},
    "more dead codes than rows": {"threshold_ema_dead_code": 9, "codebook_size": 64},
}
STEPS, ROWS = 5, 12


def batch(step, rank):
    """(1, N, 8); the second process has fewer rows."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(1, ROWS - 4 * rank, 8, generator=generator)


def modules():
    torch.manual_seed(3)
    return {name: ours.VectorQuantize(8, **({"codebook_size": 16} | options)) for name, options in CASES.items()}


def train(steps_of):
    states = {}
    for name, module in modules().items():
        torch.manual_seed(5)
        for step in range(STEPS):
            module(steps_of(step))
        states[name] = copy.deepcopy(module.state_dict())
    return states


def run(rank, world, folder):
    made_before = ours.VectorQuantize(8, 16)  # and synchronises all the same
    made_before.load_state_dict(modules()["averages"].state_dict())
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    states = train(lambda step: batch(step, rank))
    for step in range(STEPS):
        made_before(batch(step, rank))
    states["made before the group"] = made_before.state_dict()
    x = batch(0, rank)[:, :8].reshape(1, -1, 4).requires_grad_()
    lfq = ours.LFQ(codebook_size=16)
    _, losses = lfq(x, inv_temperature=1.0, return_loss_breakdown=True)
    losses.batch_entropy.backward()
    states["entropy"] = {"value": losses.batch_entropy.detach(), "gradient": x.grad}
    seeds = ours.ResidualVQ(dim=8, codebook_size=4, num_quantizers=6, quantize_dropout=True)
    torch.manual_seed(rank)
    states["dropout"] = {"indices": (seeds(batch(0, 0))[1] == -1)}
    torch.save(states, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    multiprocessing.spawn(run, (2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    joined = train(lambda step: torch.cat([batch(step, 0), batch(step, 1)], 1))
    for name, state in joined.items():
        for key, value in state.items():
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            torch.testing.assert_close(first[name][key], value, msg=lambda m, n=name, k=key: f"{n} {k}: {m}")
    for key, value in first["averages"].items():
        assert torch.equal(first["made before the group"][key], value), key
    assert torch.equal(first["dropout"]["indices"], second["dropout"]["indices"])

    parts = [batch(0, rank)[:, :8].reshape(1, -1, 4).requires_grad_() for rank in range(2)]
    _, losses = ours.LFQ(codebook_size=16)(torch.cat(parts, 1), inv_temperature=1.0, return_loss_breakdown=True)
    torch.testing.assert_close(first["entropy"]["value"], losses.batch_entropy.detach())
    # DDP averages the gradients of the processes, each of which has the entropy of all rows for its loss
    losses.batch_entropy.backward()
    for result, part in zip((first, second), parts, strict=True):
        torch.testing.assert_close(result["entropy"]["gradient"] / 2, part.grad)
