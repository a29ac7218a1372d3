"""First and second moments of named blocks of one joint vector: all that a linear latent action model needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lamkernels.validation import FLOATS

RTOL = 1e-8  # of a variance: above the rounding of float32 products in an accumulator, and far above that of fp64


class JointMoments(Protocol):
    """Means and covariances by block name, fp64 and on one device.

    An accumulator with named blocks satisfies it, and so do :class:`SampleMoments`,
    :class:`lamkernels.lam.worlds.PopulationCovariance` and the two views below. The normalisation, 1/N or 1/(N - 1), is
    the caller's: it scales the losses and nothing else.
    """

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """By block name: (d,)."""

    def covariance(self, first: str, second: str) -> Tensor:
        """Cov(first, second), (d_first, d_second)."""


class SampleMoments:
    """The moments of tensors that fit into memory, normalised by 1/N; a stream goes through an accumulator instead.

    Args:
        blocks: by name, (N, d) floating point with the same N; computed in fp64 on their device.

    Raises:
        TypeError: a block is not a floating point tensor.
        ValueError: a block is not (N, d) with one N of at least 1, or holds a number that is not finite.
    """

    def __init__(self, **blocks: Tensor) -> None:
        self.mean: dict[str, Tensor] = {}
        self._centred: dict[str, Tensor] = {}
        self._known: dict[tuple[str, str], Tensor] = {}  # each product over the rows is made once
        self._roots: dict[tuple[str, float], Tensor] = {}
        self._add(blocks)

    def joined(self, **blocks: Tensor) -> SampleMoments:
        """These moments and those of further blocks (N, d) of the same rows; what is known by now is not made again.

        Raises:
            TypeError: as for the first blocks.
            ValueError: the same, or there is a block of this name.
        """
        whole = SampleMoments()
        for name in ("mean", "_centred", "_known", "_roots"):
            setattr(whole, name, dict(getattr(self, name)))
        whole._add(blocks)
        return whole

    def _add(self, blocks: Mapping[str, Tensor]) -> None:
        rows = next((len(block) for block in self._centred.values()), None)
        for name, block in blocks.items():
            if not isinstance(block, Tensor) or block.dtype not in FLOATS:
                kind = block.dtype if isinstance(block, Tensor) else type(block).__name__
                raise TypeError(f"{name} is {kind}; it must be a floating point torch.Tensor")
            rows = len(block) if rows is None and block.ndim else rows
            if block.ndim != 2 or len(block) != rows or not rows:
                raise ValueError(
                    f"{name} has shape {tuple(block.shape)}; it must be (N, d), with the N of the others and at least 1"
                )
            if name in self.mean:
                raise ValueError(f"there is a block {name}; a further one needs another name")
            if not bool(block.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity; every entry must be finite")
            wide = block.detach().double()
            self.mean[name] = wide.mean(0)
            self._centred[name] = wide - self.mean[name]

    def covariance(self, first: str, second: str) -> Tensor:
        """Cov(first, second), (d_first, d_second) fp64.

        Raises:
            KeyError: there is no such block.
        """
        if (first, second) not in self._known:
            x, y = self._centred[first], self._centred[second]
            self._known[first, second] = x.mT @ y / len(x)
            self._known[second, first] = self._known[first, second].mT
        return self._known[first, second]

    def root(self, name: str, rtol: float) -> Tensor:
        """:func:`whitening` of a block: (r, d)."""
        if (name, rtol) not in self._roots:
            self._roots[name, rtol] = whitening(self.covariance(name, name), rtol)
        return self._roots[name, rtol]


class DerivedMoments:
    """The moments of ``base`` with further blocks that are linear in its blocks; a derived name hides one of ``base``.

    Args:
        base: the moments to start from.
        derived: by new name, a matrix (d_new, d_block) for each block of ``base`` that is summed into it; None is the
            identity.
    """

    def __init__(self, base: JointMoments, derived: Mapping[str, Mapping[str, Tensor | None]]) -> None:
        self.base, self.derived = base, derived

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """By block name: (d,)."""
        known = self.base.mean
        new = {
            name: _sum(_apply(matrix, known[b]) for b, matrix in parts.items()) for name, parts in self.derived.items()
        }
        return {**known, **new}

    def covariance(self, first: str, second: str) -> Tensor:
        """Cov(first, second), (d_first, d_second)."""
        left, right = (self.derived.get(name, {name: None}) for name in (first, second))
        return _sum(
            _apply(a, _apply(b, self.base.covariance(x, y).mT).mT) for x, a in left.items() for y, b in right.items()
        )


class ConditionalMoments:
    """What is left of every block after its linear regression on one block: partial covariances, mean 0.

    It nests: conditioning on "o" and the result on "a" conditions on both.

    Args:
        base: the moments to condition.
        given: name of the block to condition on.
        rtol: directions of ``given`` whose variance is below this share of the largest count as constant.
    """

    def __init__(self, base: JointMoments, given: str, rtol: float = RTOL) -> None:
        self.base, self.given = base, given
        whole = base.unconditional(given) if isinstance(base, ConditionalMoments) else None
        self._whitening = whitening(base.covariance(given, given), rtol, whole)  # (r, d)

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """By block name: zeros (d,)."""
        return {name: torch.zeros_like(mean) for name, mean in self.base.mean.items()}

    def covariance(self, first: str, second: str) -> Tensor:
        """Cov(first, second | given), (d_first, d_second)."""
        x = self.base.covariance(first, self.given) @ self._whitening.mT
        y = self.base.covariance(second, self.given) @ self._whitening.mT
        return self.base.covariance(first, second) - x @ y.mT

    def unconditional(self, name: str) -> Tensor:
        """Cov(name, name) before any conditioning: what rounding in the partial covariances is relative to."""
        base = self.base
        return base.unconditional(name) if isinstance(base, ConditionalMoments) else base.covariance(name, name)


def conditioned(moments: JointMoments, given: str | Sequence[str], rtol: float = RTOL) -> ConditionalMoments:
    """:class:`ConditionalMoments` on one block or on several, one after another.

    Raises:
        ValueError: no block is named.
    """
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names:
        raise ValueError("given is empty; it must name at least one block")
    result = ConditionalMoments(moments, names[0], rtol)
    for name in names[1:]:
        result = ConditionalMoments(result, name, rtol)
    return result


def regression(moments: JointMoments, target: str, inputs: str, rtol: float = RTOL) -> tuple[Tensor, int]:
    """The least-squares matrix H of target ≈ H · inputs + constant, of least norm, and the rank of the inputs.

    Args:
        moments: of both blocks.
        target: name of a block (t,).
        inputs: name of a block (d,).
        rtol: directions of the inputs with a variance below this share of the largest are not used.

    Returns:
        (t, d) fp64 and the number of directions used.
    """
    if isinstance(moments, SampleMoments):
        root = moments.root(inputs, rtol)
    else:
        root = whitening(moments.covariance(inputs, inputs), rtol)
    return moments.covariance(target, inputs) @ root.mT @ root, len(root)


def whitening(covariance: Tensor, rtol: float, whole: Tensor | None = None) -> Tensor:
    """T with T Σ Tᵀ = I on the directions of Σ that vary: its eigenvectors over the roots of the eigenvalues.

    Args:
        covariance: Σ (d, d), symmetric but for rounding.
        rtol: eigenvalues below this share of the largest are left out.
        whole: a covariance whose largest eigenvalue counts instead of that of Σ: what is left of it after a
            regression may be rounding alone.

    Returns:
        (r, d), r the rank, in descending order of the eigenvalues; TᵀT is the pseudo-inverse of what was kept.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    largest = values[-1] if whole is None else torch.linalg.eigvalsh((whole + whole.mT) / 2)[-1]
    kept = values > (rtol * largest).clamp(min=torch.finfo(values.dtype).tiny)
    rows: Tensor = vectors[:, kept] / values[kept].sqrt()
    return rows.mT.flip(0)


def effective_rank(eigenvalues: Tensor) -> float:
    """exp of the entropy of a spectrum (d,) ≥ 0 (Roy and Vetterli 2007); 0 for a spectrum of zeros.

    Returns:
        A real number from 1 (one eigenvalue) to d (all equal).
    """
    total = float(eigenvalues.sum())
    return math.exp(float(torch.special.entr(eigenvalues / total).sum())) if total > 0 else 0.0


def signed(rows: Tensor) -> Tensor:
    """Rows (k, d) with the sign that makes the entry of largest magnitude positive: a decomposition leaves it open."""
    if not rows.numel():
        return rows
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    total: Tensor = functools.reduce(torch.add, terms)
    return total


def _apply(matrix: Tensor | None, block: Tensor) -> Tensor:
    return block if matrix is None else matrix @ block
