"""What the processes of test_vq_processes.py run, and what one process runs beside them."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from datetime import timedelta

import torch
from lamkernels.bench.stock import moto, tinyworlds
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lamkernels as lk

STEPS, MODEL_STEPS, ROWS, DIM, CODES = 24, 12, 30, 4, 12
LEARNS = {"init": "kmeans", "dead_code_threshold": 2.61, "decay": 0.5}
EXACT = {"backend": "reference", **LEARNS}  # adds in fp64; other backends add x − c


def grid(step, rank):
    """Whole numbers, so that sums are exact in any order, from a few places only, so that codes die."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    places = 40.0 * torch.randint(-2, 3, (ROWS, 1), generator=generator) * ((step // 6) % 3)
    return places + torch.randint(-9, 10, (ROWS, DIM), generator=generator).float()


def uneven(step, rank):
    """Rank 1 has nothing in every third step, rank 0 rows that are not finite, and the number of rows differs."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(0 if rank == 1 and step % 3 == 0 else 20 + 7 * rank, DIM, generator=generator)
    if rank == 0:
        x[:5] = torch.nan
    return x


def restless(step, rank):
    """The same, about places that come and go, so that codes die."""
    return uneven(step, rank) + 10.0 * ((step // 4) % 3) * torch.tensor([1.0, -1.0, 1.0, 0.0])


def joined(batch, world):
    return lambda step, rank: torch.cat([batch(step, r) for r in range(world)])


def state(module):
    """A copy of the state, of which nothing is sharded."""
    full = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in module.state_dict().items()}
    return {name: value.detach().clone() for name, value in full.items()}


class Collectives(TorchDispatchMode):
    """Counts the collectives, whoever calls them from Python and however."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace in ("c10d", "_c10d_functional")
        return function(*args, **(kwargs or {}))


def collectives(run):
    """What the run returns, and how many collectives it made."""
    with Collectives() as mode:
        result = run()
    return result, mode.count


def train(vq, batch, rank):
    """The state after each step, and how many collectives each made."""
    states, counts = [], []
    for step in range(STEPS):
        _, count = collectives(lambda step=step: vq(batch(step, rank)))
        states.append(state(vq))
        counts.append(count)
    return {"states": states, "counts": counts}


class Model(nn.Module):
    """An encoder and a bottleneck."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.Linear(DIM, DIM)
        self.vq = lk.VectorQuantize(DIM, CODES, **options)
        self.made = []  # collectives of the bottleneck, for each forward

    def forward(self, x):
        h = self.encoder(x)
        (quantized, indices, loss), count = collectives(lambda: self.vq(h))
        self.made.append(count)
        return quantized.square().mean() + loss, h, indices


def fit(model, optimizer, batches):
    """One step of the optimiser, on the mean loss of the batches."""
    optimizer.zero_grad()
    for x in batches:
        (model(x)[0] / len(batches)).backward()
    optimizer.step()


def train_model(batch, rank, wrap=lambda model: model, **options):
    torch.manual_seed(7)
    model = Model(**options)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for step in range(MODEL_STEPS):
        fit(wrapped, optimizer, [batch(step, rank)])
    return {"state": state(model), "made": model.made}


def smooth(step, rank):
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1000 * rank + step))


def accumulate(batch, rank, world=1, wrap=lambda model: model, checkpointed=False, alone=False, **options):
    """Two micro-batches of each rank for a step (of one process: as many of each rank), then one update."""
    torch.manual_seed(7)
    model = Model(ema_update="manual", dead_code_threshold=0.6, decay=0.5, **options)
    wrapped, vq = wrap(model), model.vq
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    updates = []
    run = (lambda x: checkpoint(wrapped, x, use_reentrant=False)) if checkpointed else wrapped
    for step in range(MODEL_STEPS):
        optimizer.zero_grad()
        micro = [batch(2 * step + i, r) for r in (range(world) if alone else [rank]) for i in range(2)]
        counts, sums, rows = 0, 0, []
        for i, x in enumerate(micro):
            last = i == len(micro) - 1
            with nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
                loss, h, indices = run(x)
                (loss / len(micro)).backward()
            part = vq.code_statistics(h, indices)
            counts, sums = counts + part[0], sums + part[1]
            rows.append(h.detach())
        optimizer.step()
        updates.append(collectives(lambda c=counts, s=sums, r=rows: vq.update_codebook(c, s, torch.cat(r)))[1])
    return {"state": state(model), "made": model.made, "updates": updates}


def ddp(model, **options):
    return DistributedDataParallel(model, **options)


def quiet_ddp(model):
    return DistributedDataParallel(model, broadcast_buffers=False)


def sharded(model):
    return fully_shard(model)


def fsdp_gradient(rank=None, world=1):
    """Dead codes of a sharded codebook, after the optimiser's step; and what a forward that rewrites them says."""
    batch = joined(smooth, world) if rank is None else smooth
    torch.manual_seed(7)
    model = Model(update="gradient", ema_update="manual", dead_code_threshold=0.6, decay=0.5)
    refused = [Model(update="gradient", **{name: LEARNS[name]}) for name in ("init", "dead_code_threshold")]
    messages = []
    if distributed.is_initialized():
        for other in (model, *refused):
            fully_shard(other)
        for other in refused:
            try:
                other(smooth(0, rank))
            except NotImplementedError as error:
                messages.append(str(error))
            other.eval()(smooth(0, rank))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(MODEL_STEPS):
        optimizer.zero_grad()
        loss, h, indices = model(batch(step, rank))
        loss.backward()
        optimizer.step()
        model.vq.update_codebook(*model.vq.code_statistics(h, indices), h.detach())
    codebook = model.vq.codebook
    return {
        "messages": messages,
        "sharded": isinstance(codebook, DTensor),
        "codebook": codebook.full_tensor() if isinstance(codebook, DTensor) else codebook.detach(),
        "cluster_size": model.vq.cluster_size,
    }


def sharded_bottlenecks(rank):
    """What torch says of bottlenecks that were swapped and are sharded themselves, in a forward."""
    x = smooth(0, rank).view(3, 2, ROWS // 6, DIM).requires_grad_()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for bottleneck in (moto.VectorQuantizer2(CODES, DIM, 0.25), tinyworlds.FiniteScalarQuantizer(DIM, 2)):
            assert lk.compat.swap(bottleneck).swapped
            out = fully_shard(bottleneck)(x)
            (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
    return [str(warning.message) for warning in said]


def idle(rank, world=None):
    """Rank 1 has no micro-batch at all; of one process, the batches of the others of ``world``."""
    torch.manual_seed(8)
    vq = lk.VectorQuantize(DIM, CODES, ema_update="manual")
    for step in range(MODEL_STEPS):
        counts, sums = torch.zeros(CODES, dtype=torch.int64), torch.zeros(CODES, DIM)
        for other in range(world) if world else [rank]:
            if other != 1:
                x = smooth(step, other)
                part = vq.code_statistics(x, vq(x)[1])
                counts, sums = counts + part[0], sums + part[1]
        vq.update_codebook(counts, sums)
    return state(vq)


def compiled(rank):
    """Training steps in eager mode, and compiled with the all_reduce inside."""
    states = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(9)
        vq = lk.VectorQuantize(DIM, CODES, dead_code_threshold=2.61, decay=0.5, health=lk.CodebookHealth(CODES))
        run = torch.compile(vq, fullgraph=True, backend=backend) if backend else vq
        for step in range(4):
            run(smooth(step, rank))
        states.append(state(vq) | {"health": torch.tensor(vq.health.read())})
    return states


def work(rank, world, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    late = lk.VectorQuantize(DIM, CODES, health=lk.CodebookHealth(CODES), **EXACT)  # before there are processes
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    result = {}
    torch.manual_seed(1)  # of the rows that k-means starts from
    result["grid"] = train(late, grid, rank) | {"health": late.health.read(), "all": late.health.read_all()}
    result["evaluation"] = collectives(lambda: late.eval()(grid(0, rank)))[1]
    for name, (options, batch) in SETTINGS.items():
        torch.manual_seed(2)
        result[name] = train(lk.VectorQuantize(DIM, CODES, **options), batch, rank)

    torch.manual_seed(3)
    nothing_yet = lk.VectorQuantize(DIM, CODES, init="kmeans", decay=0.5)
    nowhere = [torch.empty(0, DIM), torch.full((3, DIM), torch.nan)]
    nothing_yet(nowhere[rank % 2])
    result["k-means waits"] = bool(nothing_yet.initialized)
    nothing_yet(torch.empty(0, DIM) if rank == 0 else smooth(0, rank))  # the rank whose seed counts has no row
    result["k-means"] = state(nothing_yet)

    pair = distributed.new_group([0, 1])
    torch.manual_seed(4)
    part = lk.VectorQuantize(DIM, CODES, process_group=pair, **EXACT)
    assert part.process_group is pair and copy.deepcopy(part).process_group is pair
    result["pair"] = train(part, grid, rank)

    counted = lk.CodebookHealth(CODES)
    counted.update(torch.full((CODES,), rank))
    result["counted"] = counted.read_all(), counted.read_all(), counted.read()
    watched = lk.VectorQuantize(DIM, CODES, update="gradient", health=lk.CodebookHealth(CODES))
    torch.manual_seed(5)
    watched.reset_parameters()
    result["watched"] = collectives(lambda: watched(smooth(0, rank)))[1], watched.health.read()

    for name, (wrap, options) in WRAPPED.items():
        result[f"model {name}"] = train_model(smooth, rank, wrap, **options)
    for name, options in ACCUMULATED.items():
        result[f"manual {name}"] = accumulate(smooth, rank, **options)
    result["sharded"] = fsdp_gradient(rank)
    result["said"] = sharded_bottlenecks(rank)

    result["idle"] = idle(rank)
    result["compiled"] = compiled(rank)

    torch.manual_seed(6)
    model = Model(init="kmeans")
    if rank == 0:
        model.vq.load_state_dict(late.state_dict())
    ddp(model)(smooth(0, rank))
    result["checkpoint"] = state(model.vq)
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


SETTINGS = {  # name: options, batch
    "numba": ({"backend": "numba", **LEARNS}, smooth),
    "reference": ({"backend": "reference", **LEARNS}, smooth),
    "cosine": ({"metric": "cosine", **LEARNS}, smooth),
    "gradient": ({"update": "gradient", **LEARNS}, smooth),
    "uneven": ({"init": "kmeans", "decay": 0.5}, uneven),
    "uneven dead": (LEARNS, restless),
}
WRAPPED = {  # name: wrapper, options
    "ddp": (ddp, {"dead_code_threshold": 0.6, "decay": 0.5}),
    "quiet ddp": (quiet_ddp, {"dead_code_threshold": 0.6, "decay": 0.5}),
    "fsdp": (sharded, {"dead_code_threshold": 0.6, "decay": 0.5}),
    "gradient ddp": (ddp, {"update": "gradient"}),
    "gradient fsdp": (sharded, {"update": "gradient"}),
    "gradient ddp, dead codes": (ddp, {"update": "gradient", "dead_code_threshold": 0.6, "decay": 0.5}),
}
ACCUMULATED = {
    "accumulated": {"wrap": quiet_ddp},
    "checkpointed": {"wrap": quiet_ddp, "checkpointed": True},
    "fsdp, checkpointed": {"wrap": sharded, "checkpointed": True},
    "gradient": {"wrap": quiet_ddp, "update": "gradient"},
}
