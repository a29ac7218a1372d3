"""Frames whose exogenous state is known: what every measure of leakage on pixels needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_TENSORS = (
    "frames", "actions", "starts", "exogenous", "innovation", "views", "view_exogenous", "masks", "places",
    "second_views",
)  # fmt: skip


@dataclass(frozen=True)
class ExogenousFrames:
    """Frames in the order of play, what the agent did, and the state of everything that it does not control.

    Attributes:
        frames: (T, C, S, S) uint8.
        actions: (T, p) float32: what leads from frame t to frame t + 1, one-hot where actions are discrete; zeros in
            the last frame of an episode.
        starts: (T,) bool: the first frame of an episode.
        exogenous: (T, n) float32: ξ_t, the state of the background, the camera or whatever else was added.
        innovation: (T, n) float32: ε_t of ξ_{t+1} = A ξ_t + ε_t; zeros in the last frame of an episode.
        views: (T, C, S, S) uint8, the same moments in front of another background or from another camera; or None.
        view_exogenous: (T, n), the state of that background; or None.
        action_names: of the p columns of ``actions``; empty where they have none.
        masks: (T, S, S) uint8: how much of each pixel the agent covers, 255 for all of it; or None.
        places: (T, m) float32: where the parts of the agent are; or None.
        second_views: as ``views``, from another camera where those are from the same one; or None.

    Raises:
        TypeError: a field is not a tensor of its dtype.
        ValueError: a shape does not fit the others, the first frame starts no episode, or a state is not finite.
    """

    frames: Tensor
    actions: Tensor
    starts: Tensor
    exogenous: Tensor
    innovation: Tensor
    views: Tensor | None = None
    view_exogenous: Tensor | None = None
    action_names: tuple[str, ...] = ()
    masks: Tensor | None = None
    places: Tensor | None = None
    second_views: Tensor | None = None

    def __post_init__(self) -> None:
        _check("frames", self.frames, torch.uint8, 4)
        if self.frames.shape[2] != self.frames.shape[3] or not self.frames.numel():
            raise ValueError(f"frames has shape {tuple(self.frames.shape)}; it must be (T, C, S, S), not empty")
        _check("actions", self.actions, torch.float32, 2)
        _check("starts", self.starts, torch.bool, 1)
        _check("exogenous", self.exogenous, torch.float32, 2)
        _check("innovation", self.innovation, torch.float32, 2)
        rows = len(self.frames)
        for name in _TENSORS[1:]:
            value = getattr(self, name)
            if value is not None and len(value) != rows:
                raise ValueError(f"{name} has {len(value)} rows; it must have one for each of the {rows} frames")
        for name, other in (
            ("innovation", "exogenous"),
            ("view_exogenous", "exogenous"),
            ("views", "frames"),
            ("second_views", "frames"),
        ):
            value, wanted = getattr(self, name), getattr(self, other)
            if value is not None:
                _check(name, value, wanted.dtype, wanted.ndim)
                if value.shape != wanted.shape:
                    raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be that of {other}, "
                                     f"{tuple(wanted.shape)}")  # fmt: skip
        if self.masks is not None:
            _check("masks", self.masks, torch.uint8, 3)
            if self.masks.shape[1:] != self.frames.shape[2:]:
                raise ValueError(
                    f"masks has shape {tuple(self.masks.shape)}; it must be (T, S, S) with the S of frames"
                )
        if self.places is not None:
            _check("places", self.places, torch.float32, 2)
        if not bool(self.starts[0]):
            raise ValueError("starts[0] is False; the first frame must start an episode")
        if self.action_names and len(self.action_names) != self.actions.shape[1]:
            raise ValueError(
                f"action_names has {len(self.action_names)} names; actions has {self.actions.shape[1]} columns"
            )
        for name in ("actions", "exogenous", "innovation", "view_exogenous", "places"):
            value = getattr(self, name)
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity; every entry must be finite")

    @property
    def pairs(self) -> Tensor:
        """(P,) int64: every t whose frame t + 1 belongs to the same episode."""
        return (~self.starts[1:]).nonzero().squeeze(1)

    def ahead(self, steps: int) -> Tensor:
        """(P,) int64: every t whose frame t + steps belongs to the same episode; 1 gives :attr:`pairs`."""
        episode = self.starts.cumsum(0)
        return (episode[steps:] == episode[: max(len(episode) - steps, 0)]).nonzero().squeeze(1)

    def fingerprint(self) -> str:
        """SHA-256 of all tensors, in the order of the attributes."""
        digest = hashlib.sha256()
        for name in _TENSORS:
            value = getattr(self, name)
            if value is not None:
                digest.update(f"{name} {tuple(value.shape)} ".encode())
                digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _check(name: str, value: Tensor, dtype: torch.dtype, axes: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
    if value.dtype != dtype:
        raise TypeError(f"{name} is {value.dtype}; it must be {dtype}")
    if value.ndim != axes:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have {axes} axes")
