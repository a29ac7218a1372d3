"""Training of small latent action models on frames whose exogenous state is known, under any list of objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.lam.frame_lam import FrameLAM, FrameLAMConfig
from lamkernels.lam.objectives import Batch, Objective, Step, pixel_reconstruction, total_loss
from lamkernels.validation import check_integer, check_number, check_positive

Weighted = Sequence[tuple[float, Objective]]


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        steps: of the optimiser.
        batch_size: transitions of a step, drawn with replacement.
        learning_rate: of Adam at the first step; it falls to 0 along a cosine.
        label_share: ρ in (0, 1]: the share of transitions whose action is known, the first ones.
        horizon: h, frames from "frame" to "ahead".
        seed: of the weights, the batches and the objectives.
    """

    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 3e-3
    label_share: float = 1.0
    horizon: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "horizon"):
            check_integer(name, getattr(self, name))
        check_positive("learning_rate", self.learning_rate)
        check_number("label_share", self.label_share, lambda value: 0 < value <= 1, "in (0, 1]")


class Batches:
    """Transitions of a data set, in units of a model.

    Args:
        data: frames.
        model: whose units they are in.
        rows: (N,) int64, the t of all transitions; the first ``label_share`` of them are labelled.
        config: of the training.
        flow: (T, f) float, by frame; None where no objective needs it.
        features: (T, d) float, the same.
    """

    def __init__(
        self,
        data: ExogenousFrames,
        model: FrameLAM,
        rows: Tensor,
        config: TrainingConfig,
        flow: Tensor | None = None,
        features: Tensor | None = None,
    ) -> None:
        self.device = device = model.mean.device
        self.frames = model.pixels(data.frames.to(device))
        self.views = None if data.views is None else model.pixels(data.views.to(device))
        self.flow, self.features = (None if known is None else known.to(device) for known in (flow, features))
        self.actions, self.rows, self.horizon = data.actions.to(device), rows, config.horizon
        self.labelled = round(config.label_share * len(rows))
        followed = torch.zeros(len(data.frames), dtype=torch.bool)
        followed[data.ahead(config.horizon)] = True
        self.followed = followed

    def draw(self, size: int, *, ahead: bool = False) -> Batch:
        """A batch at random; ``ahead`` draws among the transitions that the horizon does not lead out of."""
        allowed = self.followed[self.rows].nonzero().squeeze(1) if ahead else torch.arange(len(self.rows))
        chosen = allowed[torch.randint(len(allowed), (size,))]
        t = self.rows[chosen].to(self.device)
        return Batch(
            self.frames[t],
            self.frames[t + 1],
            None if self.views is None else self.views[t],
            None if self.views is None else self.views[t + 1],
            ahead=self.frames[t + self.horizon] if ahead else None,
            action=self.actions[t],
            labelled=(chosen < self.labelled).to(self.device),
            flow=None if self.flow is None else self.flow[t],
            features=None if self.features is None else self.features[t],
            next_features=None if self.features is None else self.features[t + 1],
        )


def train_frame_lam(
    data: ExogenousFrames,
    rows: Tensor,
    model_config: FrameLAMConfig,
    config: TrainingConfig,
    objectives: Callable[[FrameLAM, Batches], Weighted] | None = None,
    *,
    flow: Tensor | None = None,
    features: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> FrameLAM:
    """Minimises the objectives and the bottleneck's loss with Adam; frames are first centred and scaled.

    The mean picture is taken off and one number divides the rest, the standard deviation of what is left: without it
    the few pixels that move are so small that a network learns nothing for hundreds of steps. Squared errors keep their
    proportions, so it changes no minimum. On a CPU with one thread the same seed gives the same bits; weights start and
    batches are drawn alike on every device.

    Args:
        data: frames.
        rows: (N,) int64: the t of the transitions to train on.
        model_config: shape of the model.
        config: of the training.
        objectives: made for a model and its batches, after the seed is set; :func:`pixel_reconstruction` alone by
            default.
        flow: (T, f) float, what moved from each frame to the next.
        features: (T, d) float, of each frame, for an objective that takes precomputed ones.
        device: where the model, and all frames, are kept.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: no pixel varies.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        known = data.frames[rows].float() / 255
        mean = known.mean(0)
        scale = float((known - mean).square().mean().sqrt())
        check_positive("the standard deviation of the frames", scale)
        model = FrameLAM(model_config, mean, scale).to(device)
        batches = Batches(data, model, rows, config, flow, features)
        weighted: Weighted = [(1.0, pixel_reconstruction)] if objectives is None else objectives(model, batches)
        minimise(model, weighted, batches, config)
    return model.eval()


def minimise(model: FrameLAM, weighted: Weighted, batches: Batches, config: TrainingConfig) -> None:
    """Adam on the model and on what the objectives have in weights, ``config.steps`` times."""
    modules = nn.ModuleList([model, *(objective for _, objective in weighted if isinstance(objective, nn.Module))])
    _descend(
        modules.to(batches.device), lambda: total_loss(Step(model, batches.draw(config.batch_size)), weighted), config
    )


def train_representation(model: FrameLAM, objective: nn.Module, batches: Batches, config: TrainingConfig) -> None:
    """The same on one objective alone, that of a representation: the model is not trained and has no loss."""
    _descend(
        objective.to(batches.device),
        lambda: objective(Step(model, batches.draw(config.batch_size, ahead=True))),
        config,
    )


def _descend(modules: nn.Module, loss_of_a_batch: Callable[[], Tensor], config: TrainingConfig) -> None:
    modules.train()
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in range(config.steps):
        loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    modules.eval()
