"""The training loop: seeded, resumable to the last bit, on one process or on many."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lamkernels.lam.data import FrameData
from lamkernels.lam.files import load_tensors, save_tensors
from lamkernels.lam.model import LAMConfig, LAMOutput, LatentActionModel
from lamkernels.processes import Processes

CHECKPOINT_FORMAT = "lamkernels lam checkpoint 1"
ADAM_EPS = 1e-5  # with 1e-8, entries that have almost no gradient follow its rounding
LOSSES = ("loss", "reconstruction_loss", "bottleneck_loss")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimiser steps of the whole run; the learning rate follows them.
        batch_size: frame pairs per step.
        learning_rate: of AdamW, at its peak; linear warm-up over the first 5 %, then a cosine to zero.
        weight_decay: of AdamW.
        seed: of the initialisation, the order of the data and every draw in training.
        dtype: "float32" or "float64", of the model; the initial weights are those of float32 in both.
        amp: autocast to bfloat16. Weights, codebook and its statistics stay in ``dtype``.
        compile: compile inverse dynamics and forward model with ``torch.compile``.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0
    dtype: str = "float32"
    amp: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError("learning_rate must be positive and weight_decay at least 0")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(map(repr, DTYPES))}")
        if self.amp and self.dtype != "float32":
            raise ValueError(f"amp is for dtype 'float32', and it is {self.dtype!r}")


class Trainer:
    """Trains a :class:`LatentActionModel` on the frame pairs of ``data``.

    Everything random comes from ``config.seed``: the weights, the order of the data (a permutation per epoch, a
    function of seed and epoch alone) and the draws of the bottleneck, from a generator state of this trainer. Trainers
    can therefore take turns in one process without disturbing one another.

    Where ``torch.distributed`` is initialised, all processes make a trainer of the same arguments and take every step
    together: each computes its part of the batch, and the run is that of one process but for rounding.

    Args:
        model_config: of the model.
        data: frames; they stay on the CPU.
        config: of the training.
        pairs: (P,) int64, the first frames of the pairs to train on; None means all of ``data.pairs``.
        device: of the model.
        data_name: what tells these data from others with the same configuration, such as a checksum.

    Raises:
        ValueError: there are fewer pairs than one batch takes, or the processes cannot share a batch evenly.
    """

    def __init__(
        self,
        model_config: LAMConfig,
        data: FrameData,
        config: TrainConfig,
        *,
        pairs: Tensor | None = None,
        device: torch.device | str = "cpu",
        data_name: str = "",
    ) -> None:
        self.model_config, self.data, self.config, self.data_name = model_config, data, config, data_name
        self.pairs = data.pairs if pairs is None else pairs
        if len(self.pairs) < config.batch_size:
            raise ValueError(f"data has {len(self.pairs)} pairs; a batch takes {config.batch_size}")
        self._processes = Processes()
        if config.batch_size % self._processes.size:
            raise ValueError(
                f"batch_size is {config.batch_size}; {self._processes.size} processes must share it evenly"
            )
        self.device = torch.device(device)
        self.step = 0
        self.losses: dict[str, list[Tensor]] = {name: [] for name in LOSSES}
        self._order = (-1, torch.empty(0))
        with torch.random.fork_rng(devices=self._cuda_devices()):
            torch.manual_seed(config.seed)
            self.model = LatentActionModel(model_config).to(self.device, DTYPES[config.dtype])
            self._rng = self._rng_state()
        self._shared: nn.Module = self.model
        if config.compile:  # the networks: the bottleneck is fused as it is, and draws as it does without
            self.model.inverse_dynamics.compile()
            self.model.forward_model.compile()
        if self._processes.size > 1:
            self._shared = nn.parallel.DistributedDataParallel(self._shared)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, eps=ADAM_EPS
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Frames and next frames, (B, C, S, S) uint8, of a step: this process's part of it."""
        per_epoch = len(self.pairs) // self.config.batch_size
        epoch, position = divmod(step, per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.config.seed << 20) + epoch)
            self._order = (epoch, torch.randperm(len(self.pairs), generator=generator))
        size = self.config.batch_size // self._processes.size
        start = position * self.config.batch_size + self._processes.rank * size
        first = self.pairs[self._order[1][start : start + size]]
        return self.data.frames[first].to(self.device), self.data.frames[first + self.data.lag].to(self.device)

    def train_step(self) -> None:
        """One optimiser step; its losses are appended to ``losses``, on the device: nothing waits for it."""
        frame, next_frame = self.batch(self.step)
        self.model.train()
        self.set_learning_rate()
        with self.own_rng():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
                output: LAMOutput = self._shared(frame, next_frame)
            self.optimizer.zero_grad(set_to_none=True)
            output.loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        values = torch.stack([getattr(output, name).detach().to(output.loss) for name in LOSSES])
        for name, value in zip(LOSSES, self._processes.total(values) / self._processes.size, strict=True):
            self.losses[name].append(value)
        self.step += 1

    def run(self, until: int | None = None, *, progress: bool = True) -> None:
        """Trains up to step ``until``, or to the end, and shows a progress bar."""
        from tqdm import tqdm

        until = self.config.steps if until is None else until
        bar = tqdm(range(self.step, until), desc="training", disable=not progress)
        for _ in bar:
            self.train_step()
            if self.step % 50 == 0:
                bar.set_postfix(loss=f"{float(self.losses['loss'][-1]):.4g}")

    def curve(self, name: str = "loss") -> Tensor:
        """(step,) float, on the CPU: "loss", "reconstruction_loss" or "bottleneck_loss" of each step so far."""
        return torch.stack(self.losses[name]).cpu() if self.losses[name] else torch.empty(0)

    def save(self, path: Path | str) -> None:
        """Writes a safetensors checkpoint: weights, codebook, optimiser, random state, losses and configuration."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        tensors |= {f"rng.{k}": v for k, v in self._rng.items()}
        tensors |= {f"curve.{name}": self.curve(name) for name in LOSSES}
        save_tensors(Path(path), tensors, self._metadata() | {"step": str(self.step)})

    def load(self, path: Path | str) -> None:
        """Continues from a checkpoint of the same configuration and data, as if training had not stopped.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a checkpoint, or not one of this configuration and these data.
        """
        tensors, metadata = load_tensors(Path(path))
        for key, value in self._metadata().items():
            if metadata.get(key) != value:
                raise ValueError(f"the checkpoint {path} has {key} {metadata.get(key)}; this trainer has {value}")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "rng": {}, "curve": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        wanted = self.model.state_dict().keys()
        if parts["model"].keys() != wanted:
            raise ValueError(f"the checkpoint {path} differs in {sorted(parts['model'].keys() ^ wanted)}")
        self.model.load_state_dict(parts["model"])
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            optimizer["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(optimizer)
        self._rng = parts["rng"]
        self.losses = {name: list(parts["curve"][name].to(self.device)) for name in LOSSES}
        self.step = int(metadata["step"])

    def _metadata(self) -> dict[str, str]:
        return {
            "format": CHECKPOINT_FORMAT,
            "model_config": json.dumps(asdict(self.model_config), sort_keys=True),
            "train_config": json.dumps(asdict(self.config), sort_keys=True),
            "data_config": json.dumps(asdict(self.data.config), sort_keys=True),
            "data_name": self.data_name,
            "pairs": f"{len(self.pairs)} from {int(self.pairs[0])} to {int(self.pairs[-1])}",
            "device": self.device.type,
        }

    def set_learning_rate(self) -> None:
        """Gives the optimiser the learning rate of the step that comes."""
        warm_up, cosine = max(1, self.config.steps // 20), math.cos(math.pi * min(1.0, self.step / self.config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1.0, (self.step + 1) / warm_up) * 0.5 * (1 + cosine)

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        for device in self._cuda_devices():
            state["cuda"] = torch.cuda.get_rng_state(device)
        return state

    @contextmanager
    def own_rng(self) -> Iterator[None]:
        """Inside, torch's generators are those of this trainer."""
        with torch.random.fork_rng(devices=self._cuda_devices()):
            torch.set_rng_state(self._rng["cpu"])
            for device in self._cuda_devices():
                torch.cuda.set_rng_state(self._rng["cuda"], device)
            yield
            self._rng = self._rng_state()
