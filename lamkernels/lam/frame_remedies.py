"""The remedies as lists of objectives, on frames whose agent region is known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.lam.flow import optical_flow
from lamkernels.lam.frame_lam import FrameLAM, FrameLAMConfig, convolutions
from lamkernels.lam.frame_training import Batches, TrainingConfig, Weighted, train_frame_lam, train_representation
from lamkernels.lam.objectives import (
    ActionSupervision,
    AugmentationConsistency,
    FeatureReconstruction,
    FlowConstraint,
    MultiStepInverse,
    TemporalConsistency,
    cross_view_reconstruction,
    decorrelation,
    pixel_reconstruction,
)

WEIGHT = 100.0  # of what is added to the pixels, whose squared error is a sum over them and of this order
FEATURES = 16  # entries of a representation that is learned
HORIZON = 3  # of the multi-step inverse model, transitions
LABEL_SHARE = 0.1
REMEDIES = (
    "none",
    "action supervision",
    "10 % labelled",
    "optical flow",
    "agent region",
    "multi-step inverse",
    "cross-view",
    "temporal consistency",
    "augmentation",
    "decorrelation",
)
SECOND_CAMERA = "cross-view, second camera"
AT = REMEDIES.index("cross-view") + 1
OF_MASKS = tuple(  # where the agent has one, and there is another camera
    "agent mask" if remedy == "agent region" else remedy for remedy in (*REMEDIES[:AT], SECOND_CAMERA, *REMEDIES[AT:])
)
WITHOUT_DECODER = ("agent region", "agent mask", "multi-step inverse", SECOND_CAMERA, "temporal consistency")


class Region(nn.Module):
    """Frames (B, C, S, S) -> the pixels of a region, (B, C · pixels).

    Args:
        region: (S, S) bool.
    """

    region: Tensor

    def __init__(self, region: Tensor) -> None:
        super().__init__()
        self.register_buffer("region", region)

    def forward(self, frame: Tensor) -> Tensor:
        return frame[:, :, self.region].flatten(1)


def train_with_remedy(
    remedy: str,
    data: ExogenousFrames,
    rows: Tensor,
    region: Tensor,
    model_config: FrameLAMConfig,
    config: TrainingConfig,
    device: torch.device | str = "cpu",
) -> FrameLAM:
    """A model of the frames, trained under one remedy.

    Args:
        remedy: of :data:`REMEDIES` or :data:`OF_MASKS`. "none" reconstructs pixels. "action supervision", "10 %
            labelled", "optical flow" (of the agent alone), "augmentation" and "decorrelation" add an objective to that.
            "cross-view" and those of :data:`WITHOUT_DECODER` replace it; the latter leave the model's decoder as it was
            initialised, or train it for :data:`SECOND_CAMERA` alone.
        data: frames, with views for "cross-view", second views for :data:`SECOND_CAMERA` and masks for "agent mask".
        rows: (N,) int64, the t of the transitions to train on.
        region: (S, S) bool, the agent's.
        model_config: shape of the model.
        config: of the training.
        device: where to train.

    Returns:
        The model, in evaluation mode.
    """
    if remedy == "10 % labelled":
        config = replace(config, label_share=LABEL_SHARE)
    if remedy == "multi-step inverse":
        config = replace(config, horizon=HORIZON)
    views = {"cross-view": data.views, SECOND_CAMERA: data.second_views}
    data = replace(
        data, views=views.get(remedy), view_exogenous=None, second_views=None
    )  # batches without what is idle
    flow = agent_flow(data, region) if remedy == "optical flow" else None
    features = mask_features(data, rows) if remedy == "agent mask" else None

    def objectives(model: FrameLAM, batches: Batches) -> Weighted:
        return _objectives(remedy, data, region, model, batches, config)

    return train_frame_lam(data, rows, model_config, config, objectives, flow=flow, features=features, device=device)


def _objectives(
    remedy: str, data: ExogenousFrames, region: Tensor, model: FrameLAM, batches: Batches, config: TrainingConfig
) -> Weighted:
    shape = model.config
    k, p = shape.latent_dim, data.actions.shape[1]
    pixels: Weighted = [(1.0, pixel_reconstruction)]
    if remedy in ("action supervision", "10 % labelled"):
        return [*pixels, (WEIGHT, ActionSupervision(k, p))]
    if remedy == "optical flow":
        assert batches.flow is not None
        entries = shape.channels * shape.size**2
        return [*pixels, (WEIGHT / batches.flow.shape[1], FlowConstraint(entries, k, batches.flow.shape[1]))]
    if remedy == "agent region":
        return [(1.0, FeatureReconstruction(int(region.sum()) * shape.channels, k, Region(region)))]
    if remedy == "agent mask":
        return [(1.0, FeatureReconstruction(shape.size**2, k))]
    if remedy == "multi-step inverse":
        inverse = MultiStepInverse(embedding(shape), FEATURES, p)
        train_representation(model, inverse, batches, config)
        return [(1.0, FeatureReconstruction(FEATURES, k, inverse.features))]
    if remedy in ("cross-view", SECOND_CAMERA):
        return [(1.0, cross_view_reconstruction)]
    if remedy == "temporal consistency":
        return [(1.0, TemporalConsistency(embedding(shape), FEATURES, k))]
    if remedy == "augmentation":
        return [*pixels, (WEIGHT, AugmentationConsistency())]
    if remedy == "decorrelation":
        return [*pixels, (WEIGHT, decorrelation)]
    return pixels


def embedding(config: FrameLAMConfig) -> nn.Sequential:
    """Frames -> 16 entries: the convolutions of the model's encoder and a matrix."""
    entries = 2 * config.width * (config.size // 4) ** 2
    return nn.Sequential(convolutions(config.channels, config.width), nn.Flatten(), nn.Linear(entries, FEATURES))


def mask_features(data: ExogenousFrames, rows: Tensor) -> Tensor:
    """The agent's masks, (T, S²) float: the mean over rows (N,) int64 taken off, in units of the standard deviation."""
    assert data.masks is not None
    masks = data.masks.flatten(1).float()
    masks = masks - masks[rows].mean(0)
    return masks / masks[rows].square().mean().sqrt().clamp(min=1e-6)


def agent_flow(data: ExogenousFrames, region: Tensor) -> Tensor:
    """Optical flow of the agent from each frame to the next, in its region, (T, 2 · pixels), 0 where an episode ends.

    Of masks, where the agent has them. Without, everything outside of the region, and the median picture inside, is
    blanked out first, because the windows of a flow reach beyond it and see the background. In units of its root mean
    square: displacements depend on the size of the frames. Always by Farneback's method, so that one seed gives the
    same numbers with and without OpenCV.
    """
    flow = torch.zeros(len(data.frames), 2 * int(region.sum()))
    pairs = data.pairs
    if data.masks is None:
        grey = data.frames.float().mean(1)
        grey = (grey - grey.median(0).values) * region
    else:
        grey = data.masks.float()
    flow[pairs] = optical_flow(grey[pairs], grey[pairs + 1], "farneback")[:, :, region].flatten(1)
    return flow / flow[pairs].square().mean().sqrt().clamp(min=1e-6)
