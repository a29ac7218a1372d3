"""The linear latent action model in closed form: a reduced-rank regression on the innovation of the observation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamkernels.lam.blocks import (
    RTOL,
    ConditionalMoments,
    DerivedMoments,
    JointMoments,
    SampleMoments,
    effective_rank,
    regression,
    signed,
    whitening,
)
from lamkernels.lam.multi_step import multi_step_projection
from lamkernels.validation import check_integer, check_number, check_weight

BUFFERS = (
    "A",
    "B",
    "C",
    "D",
    "P",
    "o_mean",
    "o_next_mean",
    "context_mean",
    "target_mean",
    "eigenvalues",
    "losses",
    "ranks",
)


class LinearLAM(nn.Module):
    """z = C o + D o', ô' = A o + B z, with the least E‖ô' − o'‖² that a latent action of k entries allows.

    With W the linear regression of o' on o and e = o' − W o the innovation, only D e lowers the loss (A absorbs the
    rest of z), so C = −D W is chosen and z = D e. D maximises the variance of a target y that z explains, which is a
    reduced-rank regression of y on e (Izenman 1975): with T Σ_e Tᵀ = I and the singular value decomposition
    T Σ_ey = U S Vᵀ it is D = U_kᵀ T. z then has unit covariance. Rows of D without gain are zero.

    The target is e itself (principal components of the innovation; Zhang et al. 2025, "What Do Latent Action Models
    Actually Learn?") unless a remedy changes it (Lee et al. 2026, "Why Latent Actions Fail, and How to Prevent It"):

    - ``action_weight`` λ adds λ·ρ·E‖â − a‖² with â linear in (o, z): y = [e; √(λρ) ã], ã the residual of a on o. ρ is
      the share of labelled transitions.
    - ``flow_weight`` adds the same for a block "flow", such as optical flow of the agent's pixels, known everywhere.
    - ``cross_view`` predicts "o_next_view" from ("o_view", z): y is the innovation of the second view, which shares the
      action and not the background. ``encode`` takes the first view, ``decode`` the second view's o.
    - ``representation`` P replaces o and o' by P o and P o'; what P removes can no longer leak. "multi-step" takes P
      from :func:`lamkernels.lam.multi_step.multi_step_projection`.

    A :class:`lamkernels.Covariance` is not believed below its ``rounding``: accumulate with ``precision="exact"`` what
    changes little from one observation to the next.

    Covariances may be singular: directions whose variance is below a share ``rtol`` of the largest are left out, and
    the ranks say how many remain.

    Args:
        latent_dim: k.
        action_weight: λ ≥ 0, in squared units of o over those of a.
        flow_weight: λ ≥ 0, in squared units of o over those of the flow.
        cross_view: whether the target is the second view.
        representation: P (r, d), "multi-step" or None.
        rtol: smallest variance of o that counts, as a share of the largest: along others W says that o stays.
            Directions in which the fitted o hardly varies, such as pixels that seldom change, do not carry over to
            other data.
        innovation_rtol: smallest variance of the innovation that counts, as a share of the largest of o'.
        gain_rtol: smallest gain of a latent dimension that counts, as a share of the largest gain. Where samples are
            few, gains that are zero in the population are not; a cross-view model then needs a larger share.

    Attributes:
        A: (r, r), B: (r, k), C: (k, d), D: (k, d), all fp64; P: (r, d), or None (then r = d). A and B work on P o.
        eigenvalues: (d_e,) variances that the latent dimensions explain, all candidates in descending order; without a
            remedy the eigenvalues of Σ_e.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or ``cross_view`` is combined with a representation.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    P: Tensor | None
    o_mean: Tensor
    o_next_mean: Tensor
    context_mean: Tensor
    target_mean: Tensor
    eigenvalues: Tensor
    losses: Tensor
    ranks: Tensor

    def __init__(
        self,
        latent_dim: int,
        *,
        action_weight: float = 0.0,
        flow_weight: float = 0.0,
        cross_view: bool = False,
        representation: Tensor | str | None = None,
        rtol: float = RTOL,
        innovation_rtol: float = 10 * RTOL,  # four covariances are added up to one
        gain_rtol: float = RTOL,
    ) -> None:
        super().__init__()
        check_integer("latent_dim", latent_dim)
        check_weight("action_weight", action_weight)
        check_weight("flow_weight", flow_weight)
        for name, value in (("rtol", rtol), ("innovation_rtol", innovation_rtol), ("gain_rtol", gain_rtol)):
            check_number(name, value, lambda value: 0 <= value < 1, "at least 0 and below 1")
        if isinstance(representation, Tensor):
            if representation.ndim != 2 or not representation.is_floating_point():
                raise ValueError(
                    f"representation is {tuple(representation.shape)} {representation.dtype}; it must be (r, d) float"
                )
        elif representation not in (None, "multi-step"):
            raise ValueError(f"representation is {representation!r}; it must be a tensor (r, d), 'multi-step' or None")
        if cross_view and representation is not None:
            raise ValueError(
                "cross_view and representation are both given; a second view has pixels of its own: choose one"
            )
        self.latent_dim, self.cross_view, self.representation = latent_dim, cross_view, representation
        self.action_weight, self.flow_weight = float(action_weight), float(flow_weight)
        self.rtol, self.innovation_rtol, self.gain_rtol = rtol, innovation_rtol, gain_rtol
        for name in BUFFERS:
            self.register_buffer(name, None)

    @torch.no_grad()
    def fit(
        self,
        o: Tensor | JointMoments,
        o_next: Tensor | None = None,
        *,
        a: Tensor | None = None,
        labelled: Tensor | JointMoments | None = None,
        label_share: float = 1.0,
        flow: Tensor | None = None,
        o_view: Tensor | None = None,
        o_next_view: Tensor | None = None,
        o_ahead: Tensor | None = None,
    ) -> LinearLAM:
        """Fits in closed form, from tensors or from moments that were accumulated before.

        Args:
            o: (N, d) floating point: observations, or their features; or the moments of all blocks, whose names are
                those of the other tensor arguments. Then no other tensor is given.
            o_next: (N, d): what followed.
            a: (N, p): the actions, for ``action_weight`` and "multi-step".
            labelled: (N,) bool: the rows whose action is known, all without it; the other rows of ``a`` may hold
                anything. Beside accumulated moments, the moments of those rows alone ("o", "o_next" and "a").
            label_share: ρ in (0, 1], with moments in ``labelled``; a mask says it itself.
            flow: (N, f), for ``flow_weight``.
            o_view: (N, d₂), for ``cross_view``: the same transition seen by a second camera.
            o_next_view: (N, d₂).
            o_ahead: (N, d), for "multi-step": the observation h ≥ 1 steps after o.

        Returns:
            The model itself.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: shapes do not fit, a number is not finite, or a block that a remedy needs is missing.
        """
        check_number("label_share", label_share, lambda value: 0 < value <= 1, "in (0, 1]")
        optional = {"a": a, "flow": flow, "o_view": o_view, "o_next_view": o_next_view, "o_ahead": o_ahead}
        tensors = {name: block for name, block in optional.items() if block is not None}
        needed = self._needed()
        if isinstance(o, Tensor):
            if o_next is None or o_next.shape != o.shape:
                got = "missing" if o_next is None else tuple(o_next.shape)
                raise ValueError(f"o_next is {got}; it must be (N, d) like o, {tuple(o.shape)}")
            _check_blocks(needed, tensors)
            if label_share != 1:
                raise ValueError(f"label_share is {label_share}; beside tensors give labelled, whose share counts")
            moments, actions, label_share = _sample_moments({"o": o, "o_next": o_next, **tensors}, labelled)
        else:
            if o_next is not None or tensors or isinstance(labelled, Tensor):
                raise ValueError("o holds moments; every other tensor must then be a block of them")
            for name, source in (("o", o), ("labelled", o if labelled is None else labelled)):
                if not isinstance(getattr(source, "mean", None), Mapping):
                    kind = type(source).__name__
                    raise TypeError(f"{name} is a {kind}; it must be a tensor, or moments of named blocks")
            _check_blocks(needed | {"o", "o_next"}, o.mean)
            moments, actions = o, o if labelled is None else labelled
        self._solve(moments, actions, label_share)
        return self

    def _needed(self) -> set[str]:
        """Blocks beside "o" and "o_next"."""
        multi_step = isinstance(self.representation, str)
        return {
            name
            for name, wanted in (
                ("a", self.action_weight > 0 or multi_step),
                ("flow", self.flow_weight > 0),
                ("o_view", self.cross_view),
                ("o_next_view", self.cross_view),
                ("o_ahead", multi_step),
            )
            if wanted
        }

    def _solve(self, moments: JointMoments, actions: JointMoments, label_share: float) -> None:
        _check_finite(moments)
        self.o_mean, self.o_next_mean = moments.mean["o"], moments.mean["o_next"]
        rounding = getattr(moments, "rounding", 0.0)  # of an accumulator
        rtol, innovation_rtol = max(self.rtol, rounding), max(self.innovation_rtol, rounding)
        P = self._projection(actions)
        if P is not None:
            projected: dict[str, dict[str, Tensor | None]] = {"o": {"o": P}, "o_next": {"o_next": P}}
            moments, actions = DerivedMoments(moments, projected), DerivedMoments(actions, projected)
        W, observation_rank = _regression_of_change(moments, "o_next", "o", rtol)
        target, context, A = "o_next", "o", W
        if self.cross_view:
            target, context = "o_next_view", "o_view"
            A, _ = _regression_of_change(moments, target, context, rtol)
        innovations = DerivedMoments(moments, {"e": {"o_next": None, "o": -W}, "y": {target: None, context: -A}})
        whole = moments.covariance("o_next", "o_next")
        T = whitening(innovations.covariance("e", "e"), innovation_rtol, whole)  # (r_e, d_e)
        gains = [T @ innovations.covariance("e", "y")]  # T Σ_ey, the reconstruction first
        for name, weight, source in (
            ("a", self.action_weight * label_share, actions),
            ("flow", self.flow_weight, moments),
        ):
            if weight > 0:
                innovation = DerivedMoments(source, {"e": {"o_next": None, "o": -W}})
                partial = ConditionalMoments(innovation, "o", rtol).covariance("e", name)
                gains.append(weight**0.5 * (T @ partial))
        U, S, _ = torch.linalg.svd(torch.cat(gains, 1), full_matrices=False)
        found = S[: self.latent_dim].square()
        rank = int((found > self.gain_rtol * found.amax()).sum()) if len(found) else 0
        D = T.new_zeros(self.latent_dim, T.shape[1])
        D[:rank] = signed(U[:, :rank].mT @ T)

        self.A, self.B = A, innovations.covariance("y", "e") @ D.mT
        self.P = P
        self.C, self.D = (-D @ W, D) if P is None else (-D @ W @ P, D @ P)
        self.context_mean, self.target_mean = moments.mean[context], moments.mean[target]
        self.eigenvalues = T.new_zeros(T.shape[1])
        self.eigenvalues[: len(S)] = S.square()
        explained = torch.stack(
            [self.B.square().sum(), torch.linalg.svdvals(gains[0])[: self.latent_dim].square().sum()]
        )
        self.losses = (innovations.covariance("y", "y").trace() - explained).clamp(min=0.0)
        self.ranks = torch.tensor([observation_rank, len(T), rank], device=T.device)

    def _projection(self, moments: JointMoments) -> Tensor | None:
        """P (r, d), if the model has one."""
        if self.representation is None:
            return None
        if isinstance(self.representation, str):
            return multi_step_projection(moments)
        if self.representation.shape[1] != len(self.o_mean):
            raise ValueError(
                f"representation is {tuple(self.representation.shape)}; for o of {len(self.o_mean)} entries it must be "
                f"(r, {len(self.o_mean)})"
            )
        return self.representation.to(self.o_mean)

    @property
    def loss(self) -> float:
        """E‖ô' − o'‖² of the fit, in squared units of o: of P o' or of the second view, where these are the target."""
        return float(self._fitted("losses")[0])

    @property
    def optimal_loss(self) -> float:
        """L*: the least loss of any latent action of k entries; :attr:`loss` is above it where a remedy costs some."""
        return float(self._fitted("losses")[1])

    @property
    def observation_rank(self) -> int:
        """Directions in which (P) o varies."""
        return int(self._fitted("ranks")[0])

    @property
    def innovation_rank(self) -> int:
        """Directions in which the innovation varies."""
        return int(self._fitted("ranks")[1])

    @property
    def latent_rank(self) -> int:
        """Entries of z in use, at most k; the others are zero."""
        return int(self._fitted("ranks")[2])

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the eigenvalues: how many directions share the explained variance."""
        return effective_rank(self._fitted("eigenvalues"))

    def encode(self, o: Tensor, o_next: Tensor) -> Tensor:
        """Latent actions.

        Args:
            o: (..., d) floating point.
            o_next: (..., d).

        Returns:
            z (..., k), in the dtype of o.

        Raises:
            RuntimeError: the model is not fitted.
            ValueError: the last axis does not fit.
        """
        C, D = self._fitted("C"), self.D
        _check_rows("o", o, C.shape[1])
        _check_rows("o_next", o_next, D.shape[1])
        return ((o.to(C) - self.o_mean) @ C.mT + (o_next.to(C) - self.o_next_mean) @ D.mT).to(o.dtype)

    def decode(self, o: Tensor, z: Tensor) -> Tensor:
        """Predictions of what follows o under z.

        Args:
            o: (..., d) floating point; with ``cross_view`` the o of the second view.
            z: (..., k).

        Returns:
            ô' (..., d), in the dtype of o; with a representation the prediction (..., r) of P o'.

        Raises:
            RuntimeError: the model is not fitted.
            ValueError: the last axis does not fit.
        """
        A, P = self._fitted("A"), self.P
        _check_rows("o", o, A.shape[1] if P is None else P.shape[1])
        _check_rows("z", z, self.latent_dim)
        state = o.to(A) if P is None else o.to(A) @ P.mT
        return (self.target_mean + (state - self.context_mean) @ A.mT + z.to(A) @ self.B.mT).to(o.dtype)

    def forward(self, o: Tensor, o_next: Tensor) -> Tensor:
        """ô' (..., d) through the latent action, for a model of one view; shapes and errors of :meth:`encode`."""
        return self.decode(o, self.encode(o, o_next))

    def latent_moments(
        self, moments: JointMoments, *, z: str = "z", o: str = "o", o_next: str = "o_next"
    ) -> DerivedMoments:
        """The moments with the latent action as a further block: what the measures take.

        Args:
            moments: of at least the blocks ``o`` and ``o_next``.
            z: name of the new block.
            o: name of the block that is encoded as o.
            o_next: name of the block that is encoded as o'.

        Raises:
            RuntimeError: the model is not fitted.
        """
        return DerivedMoments(moments, {z: {o: self._fitted("C"), o_next: self.D}})

    def extra_repr(self) -> str:
        """The dimensions, once fitted with the loss."""
        fitted = "" if self.losses is None else f", loss={self.loss:.4g}, optimal_loss={self.optimal_loss:.4g}"
        return f"latent_dim={self.latent_dim}{fitted}"

    def _fitted(self, name: str) -> Tensor:
        if self.losses is None:
            raise RuntimeError("this LinearLAM is not fitted; call fit, or load a state_dict")
        value: Tensor = getattr(self, name)
        return value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Makes room for tensors whose shapes only the data knew; a state without any leaves the fit alone."""
        given = {name: state_dict[prefix + name] for name in BUFFERS if prefix + name in state_dict}
        if given:
            latent_dim = len(given.get("D", range(self.latent_dim)))
            if latent_dim != self.latent_dim:
                error_msgs.append(f"{prefix}D has {latent_dim} rows; this model's latent_dim is {self.latent_dim}")
                return
            absent = [name for name in BUFFERS if name not in given and getattr(self, name) is None]
            missing_keys += [prefix + name for name in absent if name != "P"]
            for name, value in given.items():
                setattr(self, name, torch.empty_like(value))
            if "P" not in given:
                self.P = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _sample_moments(
    blocks: dict[str, Tensor], labelled: Tensor | JointMoments | None
) -> tuple[JointMoments, JointMoments, float]:
    """Moments of all rows, of the labelled rows, and the share of these."""
    if labelled is None:
        moments = SampleMoments(**blocks)
        return moments, moments, 1.0
    if not isinstance(labelled, Tensor) or labelled.dtype != torch.bool:
        raise TypeError("labelled must be a bool tensor (N,) beside tensors, and moments beside moments")
    rows = len(blocks["o"])
    if labelled.shape != (rows,) or not bool(labelled.any()):
        raise ValueError(f"labelled has shape {tuple(labelled.shape)}; it must be ({rows},) with a labelled row")
    if "a" in blocks and len(blocks["a"]) != rows:
        raise ValueError(
            f"a has shape {tuple(blocks['a'].shape)}; it must be ({rows}, p), the unlabelled rows included"
        )
    moments = SampleMoments(**{name: block for name, block in blocks.items() if name != "a"})
    known = SampleMoments(**{name: block[labelled] for name, block in blocks.items()})
    return moments, known, float(labelled.double().mean())


def _regression_of_change(moments: JointMoments, after: str, before: str, rtol: float) -> tuple[Tensor, int]:
    """The regression of ``after`` on ``before`` and its rank; what it does not use of ``before`` stays as it is."""
    mean = moments.mean[before]
    stays = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    change = DerivedMoments(moments, {"change": {after: None, before: -stays}})
    H, rank = regression(change, "change", before, rtol)
    return H + stays, rank


def _check_blocks(needed: set[str], present: Mapping[str, Tensor]) -> None:
    missing = sorted(needed - present.keys())
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; this model needs {', '.join(sorted(needed))}")


def _check_finite(moments: JointMoments) -> None:
    for first, second in (("o", "o"), ("o_next", "o"), ("o_next", "o_next")):
        if not bool(moments.covariance(first, second).isfinite().all()):
            raise ValueError(f"the covariance of {first} and {second} holds NaN or infinity; all must be finite")


def _check_rows(name: str, rows: Tensor, entries: int) -> None:
    if rows.ndim == 0 or rows.shape[-1] != entries:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; its last axis must have {entries} entries")
