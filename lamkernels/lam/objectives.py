"""What the reference LAM minimises besides the bottleneck's own loss."""

from __future__ import annotations

from torch import Tensor

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
    change = target - frame
    weights = 1 + weight * (change.abs().amax(1, keepdim=True) > MOTION_THRESHOLD).to(change)  # (B, 1, H, W)
    copying = (change.square() * weights).sum((1, 2, 3))  # (B,)
    error = ((prediction - target).square() * weights).sum((1, 2, 3))
    soft = copying + copying.mean().clamp(min=STILL * target[0].numel())
    return (error / soft).sum() / (copying / soft).sum().clamp(min=STILL * len(copying))
