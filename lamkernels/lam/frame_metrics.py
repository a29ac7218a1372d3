"""Measures of a latent action on frames whose exogenous state is known.

Leakage and recovery are those of :mod:`linear_metrics`, given o. A frame has too many entries to regress on, so "o"
stands for what of it can matter: the picture at a quarter of the pixels, where the agent is (the pixels of its region,
or its coordinates), and the exogenous state itself. The same z is also read by a probe on random features, because a
sprite that moves is not linear in pixels and a network may encode its motion in terms of where it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lamkernels.lam.blocks import RTOL, SampleMoments
from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.lam.linear_metrics import pair_inconsistency, probe_r2
from lamkernels.lam.metrics import linear_probe
from lamkernels.validation import check_integer, check_positive

FEATURES = 300  # random features of a probe
PENALTY, SMALLEST = 1e-2, 1e-3  # ridge and truncation of a probe on them, which are many and nearly dependent
LABELS = 64  # labelled transitions of the decoder that has few

Rows = dict[str, float]


@dataclass(frozen=True)
class Latents:
    """Latent actions of the transitions of one data set.

    Attributes:
        z: (P, k) float, of the rows ``data.pairs``.
        view: (P, k), of the same moments in the other view; None without views.
        indices: (P, ...) int64, codes; None without a codebook.
    """

    z: Tensor
    view: Tensor | None = None
    indices: Tensor | None = None


class Probes:
    """How much of ε and of the action latent actions say given o, by probes on held-out transitions.

    All that does not depend on z is computed once, for any number of models of one data set.

    Args:
        data: frames.
        direction: (p, m): what of the action is asked for, such as one way against the other.
        place: (T, d) float: where the agent is, such as the pixels of its region.
        split: probes are fitted on the pairs before it and tested on those behind.
        kinds: entries of ε that are asked for alone too, by name.
    """

    def __init__(
        self,
        data: ExogenousFrames,
        direction: Tensor,
        place: Tensor,
        split: int,
        kinds: Mapping[str, slice] | None = None,
    ) -> None:
        self.split, self.kinds = split, tuple(kinds or {})
        pairs = data.pairs
        eps, where = data.innovation[pairs], place[pairs]
        asked = {"a": data.actions[pairs] @ direction, "eps": eps}
        asked |= {name: eps[:, entries] for name, entries in (kinds or {}).items()}
        o = _observation(data.frames, data.exogenous, place, pairs)
        where = where - where[:split].mean(0)
        self.where = where / where[:split].std().clamp(min=1e-6)
        rich = torch.cat([o, random_features(self.where, FEATURES, 0.3)], 1)
        self.plain = self._halves(RTOL, o=o, **asked)
        self.rich = self._halves(SMALLEST, o=rich, **asked)
        self.views: SampleMoments | None = None
        if data.views is not None and data.view_exogenous is not None:
            other = _observation(data.views, data.view_exogenous, place, pairs)
            self.views = SampleMoments(o=o[split:], o_view=other[split:])
            self.views.root("o", RTOL)
            self.views.root("o_view", RTOL)

    def _halves(self, rtol: float, **blocks: Tensor) -> tuple[SampleMoments, SampleMoments]:
        train, test = (
            SampleMoments(**{name: block[part] for name, block in blocks.items()})
            for part in (slice(self.split), slice(self.split, None))
        )
        train.root("o", rtol)
        for moments, name in itertools.product((train, test), blocks):
            moments.covariance(name, "o")
        return train, test

    def __call__(self, latents: Latents) -> Rows:
        """Measures.

        Args:
            latents: of ``data.pairs``.

        Returns:
            "leakage" and "recovery", :func:`lamkernels.lam.linear_metrics.probe_r2`; "leakage_features" and
            "recovery_features", the same with random features of o in the place of o, and of z and o in that of z; and
            with views "inconsistency", of z in front of two backgrounds; "leakage_NAME" of each kind.
        """
        split = self.split
        z = latents.z - latents.z[:split].mean(0)
        z = z / z[:split].std().clamp(min=1e-6)
        both = torch.cat([0.3 * self.where, z], 1)
        rich = torch.cat([z, random_features(both, FEATURES, 1.0), random_features(z, FEATURES // 6, 1.0)], 1)
        found: Rows = {}
        for suffix, known, block, l2, rtol in (
            ("", self.plain, z, 1e-4, RTOL), ("_features", self.rich, rich, PENALTY, SMALLEST)
        ):  # fmt: skip
            train, test = (
                moments.joined(z=block[part])
                for moments, part in zip(known, (slice(split), slice(split, None)), strict=True)
            )
            asked = {"leakage": "eps", "recovery": "a"} | ({} if suffix else {f"leakage_{k}": k for k in self.kinds})
            found |= {f"{name}{suffix}": probe_r2(train, test, of, l2=l2, rtol=rtol) for name, of in asked.items()}
        if latents.view is not None and self.views is not None:
            moments = self.views.joined(z=latents.z[split:], z_view=latents.view[split:])
            found["inconsistency"] = pair_inconsistency(moments)
        return found


def _observation(frames: Tensor, state: Tensor, place: Tensor, pairs: Tensor) -> Tensor:
    """What stands for o, (P, d): the module's docstring."""
    pixels = F.avg_pool2d(frames[pairs].float() / 255, 2)
    return torch.cat([pixels.flatten(1), place[pairs], state[pairs] / 255], 1)


def random_features(x: Tensor, count: int, frequency: float, seed: int = 0) -> Tensor:
    """cos(x W + b), W normal and b uniform (Rahimi and Recht 2007): a linear probe on them is a smooth one on x.

    Args:
        x: (N, d) float, of scale about 1.
        count: of features.
        frequency: standard deviation of the entries of W: the inverse of the length over which the probe may change.
        seed: of W and b.

    Returns:
        (N, count) float.
    """
    check_integer("count", count)
    check_positive("frequency", frequency)
    generator = torch.Generator().manual_seed(seed)
    W = frequency * torch.randn(x.shape[1], count, generator=generator, dtype=torch.float64)
    b = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    return (x @ W.to(x) + b.to(x)).cos()


def mutual_information(codes: Tensor, labels: Tensor) -> float:
    """I(code; label) in bits, from counts, with the correction of Miller (1955) for their bias.

    Args:
        codes: (N,) or (N, tokens) int64; tokens are taken together, as one word.
        labels: (N,) int64.

    Returns:
        At least 0.

    Raises:
        ValueError: the rows do not match, or there are none.
    """
    if not len(codes) or labels.shape != codes.shape[:1]:
        raise ValueError(
            f"codes is {tuple(codes.shape)} and labels {tuple(labels.shape)}; they must be (N, ...) and (N,) with one N"
        )
    _, word = torch.unique(codes.flatten(1) if codes.ndim > 1 else codes[:, None], dim=0, return_inverse=True)
    _, label = torch.unique(labels, return_inverse=True)
    joint = torch.zeros(int(word.max()) + 1, int(label.max()) + 1, dtype=torch.float64)
    joint.index_put_((word, label), torch.ones(len(word), dtype=torch.float64), accumulate=True)
    parts = [joint.sum(1), joint.sum(0), joint.flatten()]
    first, second, both = (float(torch.special.entr(part / len(word)).sum()) for part in parts)
    bins = [int((part > 0).sum()) - 1 for part in parts]
    bias = (bins[0] + bins[1] - bins[2]) / (2 * len(word))
    return max((first + second - both + bias) / math.log(2), 0.0)


def psnr(prediction: Tensor, target: Tensor, region: Tensor | None = None) -> float:
    """Mean over frames of 10 log₁₀(1 / MSE), dB, of frames (B, C, S, S) in [0, 1] pixel units, or of one region."""
    error = (prediction - target).square()
    error = error.flatten(1) if region is None else error[:, :, region].flatten(1)
    return float(-10 * error.mean(1).clamp(min=1e-12).log10().mean())


def controllability(
    decode: Callable[[Tensor, Tensor], Tensor],
    frame: Tensor,
    next_frame: Tensor,
    z: Tensor,
    region: Tensor | None = None,
    seed: int = 0,
) -> float:
    """ΔPSNR (Bruce et al. 2024, Genie): how much worse a prediction is under another transition's z than under its own.

    Genie draws its codes uniformly; here they are those of other transitions, so that the measure is the same without
    a codebook. With the frames of another scene in front of z it says what z is worth there: transfer.

    Args:
        decode: frame (B, C, S, S) and z (B, k) -> the next frame, all in [0, 1] pixel units.
        frame: where z is applied.
        next_frame: what followed there.
        z: the latent actions that were inferred, of this scene or of another.
        region: (S, S) bool: where the error counts; None means everywhere.
        seed: of the permutation.

    Returns:
        PSNR under z less PSNR under the z of others, dB; about 0 where z does not matter.
    """
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    own, other = (psnr(decode(frame, latent), next_frame, region) for latent in (z, z[order]))
    return own - other


def few_label_accuracy(z: Tensor, labels: Tensor, split: int, count: int = LABELS) -> float:
    """Balanced accuracy of a logistic decoder of the action from z alone, fitted on ``count`` labelled transitions.

    Args:
        z: (N, k) float.
        labels: (N,) int64.
        split: the decoder is fitted before it, on the first ``count`` rows, and tested behind.
        count: of labels.
    """
    check_integer("count", count)
    return linear_probe(z[:count], labels[:count], z[split:], labels[split:]).balanced_accuracy


def agent_innovation(frames: Tensor, region: Tensor) -> float:
    """What the agent does to the next frame that o does not say: E‖o'_R − E[o'_R | place]‖², in grey levels squared.

    R is the agent's region, its place the centroid there of what differs from the median picture, in bins of a quarter
    of a pixel. It is the variance that one latent dimension can explain if it says how far the agent moved: what the
    largest eigenvalue of Σ_q is where pixels are linear in the state.

    Args:
        frames: (P, 2, S, S) float, grey levels, without an overlay: o and o'.
        region: (S, S) bool.
    """
    size = frames.shape[-1]
    difference = (frames[:, 0] - frames[:, 0].median(0).values).clamp(min=0) * region
    mass = difference.sum((1, 2)).clamp(min=1e-6)
    step = torch.arange(size, dtype=frames.dtype)
    rows = (difference.sum(2) @ step / mass * 4).round().long()
    columns = (difference.sum(1) @ step / mass * 4).round().long()
    _, place = torch.unique(rows * 4 * size + columns, return_inverse=True)
    target = frames[:, 1][:, region].double()
    count = torch.bincount(place).double()
    sums = torch.zeros(len(count), target.shape[1], dtype=torch.float64).index_add_(0, place, target)
    left = (target - (sums / count[:, None])[place]).square().sum(1)
    several = count[place] > 1  # a bin of one has nothing left, which says nothing
    return float((left * (count / (count - 1).clamp(min=1))[place])[several].mean())
