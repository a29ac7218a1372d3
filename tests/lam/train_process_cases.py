"""What the processes of tests/lam/test_train_processes.py do; spawned processes import it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import distributed

from lamkernels.lam import LAMConfig, TrainConfig, Trainer

MODEL = LAMConfig(size=32, latent_dim=8, tokens=2, codebook_size=8)
TRAINING = TrainConfig(steps=8, batch_size=24, learning_rate=2e-3, dtype="float64")
KINDS = ("vq", "gaussian")


def trained(data, kind):
    """The losses (3, steps) and the state of a training."""
    trainer = Trainer(replace(MODEL, bottleneck=kind), data, TRAINING)
    for _ in range(TRAINING.steps):
        trainer.train_step()
    return torch.stack([trainer.curve(name) for name in trainer.losses]), trainer.model.state_dict()


def work(rank, world, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # pytest's filters do not reach this process
    data = torch.load(folder / "data.pt", weights_only=False)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    torch.save({kind: trained(data, kind) for kind in KINDS}, folder / f"{rank}.pt")
    distributed.destroy_process_group()
