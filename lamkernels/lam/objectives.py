"""What the reference LAM minimises besides the bottleneck's own loss."""

from __future__ import annotations

from torch import Tensor

MOTION_THRESHOLD = 0.04  # of the pixel range: above the rounding of resized frames, below the contrast of a sprite


def motion_weighted_mse(prediction: Tensor, target: Tensor, frame: Tensor, weight: float) -> Tensor:
    """Squared error in which the pixels that change count ``1 + weight`` times.

    In an Atari frame a few pixels move and the rest are copied, so the plain mean says almost nothing about the
    player. The weight depends on the two frames only: no action, no label, no mask of the player.

    Args:
        prediction: (B, C, H, W) float, in [0, 1] pixel units.
        target: (B, C, H, W) float, the next frame.
        frame: (B, C, H, W) float, the current frame.
        weight: extra weight of a pixel whose channels change by more than 0.04; 0 is the plain mean.

    Returns:
        () float: Σ w·(prediction − target)² / (B·C·H·W), w ∈ {1, 1 + weight}.
    """
    squared = (prediction - target).square()
    if weight == 0:
        return squared.mean()
    moved = ((target - frame).abs().amax(1, keepdim=True) > MOTION_THRESHOLD).to(squared)
    return (squared * (1 + weight * moved)).mean()
