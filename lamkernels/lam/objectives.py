"""What latent action models minimise besides the bottleneck's own loss.

An objective is a function of a :class:`Step`, a model on a batch, that returns a loss (); one with weights of its own
is a module, and is trained along. A remedy is a list of objectives with weights: :func:`total_loss`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.joint_moments import off_diagonal_covariance_loss
from lamkernels.validation import check_number, check_weight

if TYPE_CHECKING:
    from lamkernels.lam.frame_lam import Latent

MOTION_THRESHOLD = 0.04  # of the pixel range: above the rounding of resized frames, below the contrast of a sprite
STILL = 1e-4  # mean squared change, in [0, 1] pixel units, of a batch in which nothing moves


def relative_motion_error(prediction: Tensor, target: Tensor, frame: Tensor, weight: float) -> Tensor:
    """Squared error over that of copying the frame: 1 is "nothing moves", 0 is a perfect prediction.

    In an Atari frame a few pixels move and the rest are copied, so the plain mean is tiny and says almost nothing about
    the player: pixels that change count ``1 + weight`` times. And where a score or a ball jumps, much more changes than
    elsewhere: no transition counts for more than twice one of mean change. All this depends on the two frames only: no
    action, no label, no mask of the player.

    Args:
        prediction: (B, C, H, W) float, in [0, 1] pixel units.
        target: (B, C, H, W) float, the next frame.
        frame: (B, C, H, W) float, the current frame.
        weight: extra weight of a pixel of which a channel changes by more than 0.04; 0 weighs all alike.

    Returns:
        () float: Σ_b error_b / (copying_b + m) over Σ_b copying_b / (copying_b + m), with the sums over pixels
        error = Σ w·(prediction − target)² and copying = Σ w·(target − frame)², w ∈ {1, 1 + weight}, and m the mean
        of copying over the batch.
    """
    return share_of_copying(*motion_errors(prediction, target, frame, weight), target[0].numel())


def motion_errors(prediction: Tensor, target: Tensor, frame: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The sums ``error`` and ``copying`` of :func:`relative_motion_error`, whose arguments these are, (B,) each."""
    change = target - frame
    weights = 1 + weight * (change.abs().amax(1, keepdim=True) > MOTION_THRESHOLD).to(change)  # (B, 1, H, W)
    copying = (change.square() * weights).sum((1, 2, 3))
    return ((prediction - target).square() * weights).sum((1, 2, 3)), copying


def share_of_copying(error: Tensor, copying: Tensor, entries: int) -> Tensor:
    """() float: :func:`relative_motion_error` from its sums (B,), of frames of so many entries."""
    soft = copying + copying.mean().clamp(min=STILL * entries)
    return (error / soft).sum() / (copying / soft).sum().clamp(min=STILL * len(copying))


class Batch(NamedTuple):
    """Transitions, frames (B, C, S, S) float in units of the model; what an objective does not need may be absent.

    Attributes:
        frame: o.
        next_frame: o'.
        view: the moment of o in front of another background or from another camera.
        next_view: the same of o'.
        ahead: the frame h ≥ 1 steps after o.
        action: (B, p) float: what was played.
        labelled: (B,) bool: where the action is known; None means everywhere.
        flow: (B, f) float: what moved, such as :func:`lamkernels.lam.flow.optical_flow`, flattened.
        features: (B, d) float: precomputed, of o.
        next_features: the same of o'.
    """

    frame: Tensor
    next_frame: Tensor
    view: Tensor | None = None
    next_view: Tensor | None = None
    ahead: Tensor | None = None
    action: Tensor | None = None
    labelled: Tensor | None = None
    flow: Tensor | None = None
    features: Tensor | None = None
    next_features: Tensor | None = None


class FrameModel(Protocol):
    """What objectives ask of a model: :class:`lamkernels.lam.frame_lam.FrameLAM` has it."""

    def infer(self, frame: Tensor, next_frame: Tensor) -> Latent:
        """The latent action between two frames."""

    def before_bottleneck(self, frame: Tensor, next_frame: Tensor) -> Tensor:
        """What goes into the bottleneck, (B, k), normalised as by ``infer``; no state of the model changes."""

    def decode(self, frame: Tensor, z: Tensor) -> Tensor:
        """The next frame under a latent action (B, k)."""


class Step:
    """A model on a batch; what several objectives need is computed once, and only if one of them does.

    Args:
        model: has ``infer``, ``before_bottleneck`` and ``decode``.
        batch: of transitions.
    """

    def __init__(self, model: FrameModel, batch: Batch) -> None:
        self.model, self.batch = model, batch

    @cached_property
    def latent(self) -> Latent:
        """The latent actions of the batch."""
        return self.model.infer(self.batch.frame, self.batch.next_frame)

    @cached_property
    def prediction(self) -> Tensor:
        """ô' (B, C, S, S)."""
        return self.model.decode(self.batch.frame, self.latent.z)

    def need(self, *names: str) -> list[Tensor]:
        """Fields of the batch.

        Raises:
            ValueError: one is None.
        """
        found = [getattr(self.batch, name) for name in names]
        absent = [name for name, value in zip(names, found, strict=True) if value is None]
        if absent:
            raise ValueError(f"the batch has no {' and no '.join(absent)}; this objective needs {', '.join(names)}")
        return found


Objective = Callable[[Step], Tensor]


def total_loss(step: Step, objectives: Sequence[tuple[float, Objective]]) -> Tensor:
    """The bottleneck's own loss and Σ weight · objective, ()."""
    loss = step.latent.loss
    for weight, objective in objectives:
        loss = loss + weight * objective(step)
    return loss


def pixel_reconstruction(step: Step) -> Tensor:
    """E‖ô' − o'‖², the sum over pixels and the mean over the batch: what a plain latent action model minimises."""
    return _distance(step.prediction, step.batch.next_frame)


def cross_view_reconstruction(step: Step) -> Tensor:
    """E‖ô₂' − o₂'‖², the second view predicted from its own frame and the z of the first (Lee et al. 2026, MVP-LAM)."""
    view, next_view = step.need("view", "next_view")
    return _distance(step.model.decode(view, step.latent.z), next_view)


def decorrelation(step: Step) -> Tensor:
    """The covariance loss of VICReg on what goes into the bottleneck: entries of z must not say the same."""
    return off_diagonal_covariance_loss(step.latent.before)


class FeatureReconstruction(nn.Module):
    """E‖φ̂' − φ(o')‖² with φ̂' = φ(o) + perceptron(φ(o), z): the forward model works in a frozen feature space.

    Args:
        dim: d, entries of φ.
        latent_dim: k.
        features: φ, frames (B, C, S, S) -> (B, ...) of d entries; it is not trained. None takes the precomputed ones of
            the batch.
        hidden: width of the perceptron.
    """

    def __init__(self, dim: int, latent_dim: int, features: nn.Module | None = None, *, hidden: int = 128) -> None:
        super().__init__()
        self.features = None if features is None else copy.deepcopy(features).requires_grad_(False).eval()
        self.forward_model = perceptron(dim + latent_dim, hidden, dim)

    def forward(self, step: Step) -> Tensor:
        if self.features is None:
            before, after = step.need("features", "next_features")
        else:
            with torch.no_grad():
                before, after = (self.features(o).flatten(1) for o in (step.batch.frame, step.batch.next_frame))
        return _distance(before + self.forward_model(torch.cat([before, step.latent.z], 1)), after)

    def train(self, mode: bool = True) -> FeatureReconstruction:
        """As for any module, but φ stays in evaluation mode."""
        super().train(mode)
        if self.features is not None:
            self.features.eval()
        return self


class TemporalConsistency(nn.Module):
    """The next frame's embedding is predicted from this one's and z, with a slow copy of the encoder as the target.

    E‖n(ĥ') − n(h̄')‖², n to unit length (as in Grill et al. 2020, BYOL), in the place of pixels (Nikulin et al. 2025,
    LAOM): the embedding chooses what is worth predicting. In training every call first moves the copy.

    Args:
        encoder: frames -> (B, ...) of d entries, trained along.
        dim: d.
        latent_dim: k.
        hidden: width of the predictor.
        momentum: of the copy, in [0, 1).
    """

    def __init__(
        self, encoder: nn.Module, dim: int, latent_dim: int, *, hidden: int = 128, momentum: float = 0.99
    ) -> None:
        super().__init__()
        check_number("momentum", momentum, lambda value: 0 <= value < 1, "in [0, 1)")
        self.momentum = momentum
        self.encoder = encoder
        self.slow = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = perceptron(dim + latent_dim, hidden, dim)

    def forward(self, step: Step) -> Tensor:
        if self.training:
            with torch.no_grad():
                for old, new in zip(self.slow.parameters(), self.encoder.parameters(), strict=True):
                    old.lerp_(new, 1 - self.momentum)
        with torch.no_grad():
            target = self.slow(step.batch.next_frame).flatten(1)
        found = self.predictor(torch.cat([self.encoder(step.batch.frame).flatten(1), step.latent.z], 1))
        return _distance(F.normalize(found, dim=1), F.normalize(target, dim=1))


class ActionSupervision(nn.Module):
    """E[labelled · ‖â − a‖²] / E[labelled] with â linear in z; a batch without a label gives 0.

    The weight in front is the λρ of docs/linear-lam.md, since the mean is over labelled rows.

    Args:
        latent_dim: k.
        actions: p.
    """

    def __init__(self, latent_dim: int, actions: int) -> None:
        super().__init__()
        self.head = nn.Linear(latent_dim, actions)

    def forward(self, step: Step) -> Tensor:
        (action,) = step.need("action")
        error = (self.head(step.latent.z) - action).square().sum(1)
        labelled = step.batch.labelled
        known = torch.ones_like(error) if labelled is None else labelled.to(error)
        loss: Tensor = (error * known).sum() / known.sum().clamp(min=1)
        return loss


class FlowConstraint(nn.Module):
    """E‖f̂ − f‖², the optical flow f predicted from (o, z) by a perceptron (Bu et al. 2025, LAOF).

    Args:
        pixels: C · S · S, entries of a frame.
        latent_dim: k.
        flow_dim: entries of f.
        hidden: width of the perceptron.
    """

    def __init__(self, pixels: int, latent_dim: int, flow_dim: int, *, hidden: int = 128) -> None:
        super().__init__()
        self.head = perceptron(pixels + latent_dim, hidden, flow_dim)

    def forward(self, step: Step) -> Tensor:
        (flow,) = step.need("flow")
        return _distance(self.head(torch.cat([step.batch.frame.flatten(1), step.latent.z], 1)), flow)


class MultiStepInverse(nn.Module):
    """E‖â − a‖², the first action predicted from φ(o_t) and φ(o_{t+h}) (Lamb et al. 2022, AC-State).

    It does not look at z: it trains φ, which then is the feature space of :class:`FeatureReconstruction`. What the
    agent does not control says nothing about its action, so nothing makes φ keep it.

    Args:
        features: φ, frames -> (B, ...) of d entries, trained along.
        dim: d.
        actions: p.
        hidden: width of the perceptron.
    """

    def __init__(self, features: nn.Module, dim: int, actions: int, *, hidden: int = 128) -> None:
        super().__init__()
        self.features = features
        self.head = perceptron(2 * dim, hidden, actions)

    def forward(self, step: Step) -> Tensor:
        ahead, action = step.need("ahead", "action")
        both = [self.features(o).flatten(1) for o in (step.batch.frame, ahead)]
        return _distance(self.head(torch.cat(both, 1)), action)


class AugmentationConsistency:
    """E‖x(augmented) − x‖² / k of what goes into the bottleneck: z must not depend on what the augmentation changes.

    Args:
        augment: one frame (B, C, S, S) -> the same moment, changed at random; called for o and for o'.
            :class:`Shading` by default.
    """

    def __init__(self, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.augment = Shading() if augment is None else augment

    def __call__(self, step: Step) -> Tensor:
        changed = step.model.before_bottleneck(*map(self.augment, (step.batch.frame, step.batch.next_frame)))
        return F.mse_loss(changed, step.latent.before)


class Shading:
    """Adds a smooth random field, one for each frame: N(0, strength²) on a grid, interpolated between its points.

    Args:
        strength: in units of the frames.
        points: of the grid along each axis.
    """

    def __init__(self, strength: float = 2.0, points: int = 4) -> None:
        check_weight("strength", strength)
        self.strength, self.points = strength, points

    def __call__(self, frame: Tensor) -> Tensor:
        field = self.strength * torch.randn(len(frame), 1, self.points, self.points).to(frame)
        shade: Tensor = F.interpolate(field, frame.shape[2:], mode="bilinear", align_corners=True)
        return frame + shade


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().flatten(1).sum(1).mean()
