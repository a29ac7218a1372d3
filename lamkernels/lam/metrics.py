"""What a latent action is worth: does it say which action was played, and how many codes are in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ProbeResult:
    """Held-out result of :func:`linear_probe`.

    Attributes:
        accuracy: share of test rows whose class the probe names.
        majority_accuracy: the same for always naming the commonest class of the training rows.
        balanced_accuracy: mean over the classes of the share of their test rows that the probe names.
        train_rows: rows that the probe was fitted on.
        test_rows: rows that it was tested on.
        confusion: (classes, classes) int64: test rows by true class (axis 0) and named class (axis 1).
    """

    accuracy: float
    majority_accuracy: float
    balanced_accuracy: float
    train_rows: int
    test_rows: int
    confusion: Tensor


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    l2: float = 1e-4,
) -> ProbeResult:
    """Multinomial logistic regression, fitted on one set of rows and tested on another.

    Deterministic: fp64, full-batch L-BFGS from zero; the features are standardised with the training moments.

    Args:
        train_features: (N, F) floating point.
        train_labels: (N,) int64 ≥ 0.
        test_features: (M, F) floating point.
        test_labels: (M,) int64 ≥ 0.
        l2: penalty on the squared weights.

    Raises:
        ValueError: a shape does not fit, or there is no row to fit or to test.
    """
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise ValueError(
                f"{name}_features has shape {tuple(features.shape)} and {name}_labels {tuple(labels.shape)}; "
                f"they must be (N, F) and (N,) with N at least 1"
            )
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train_features has {train_features.shape[1]} columns, test_features {test_features.shape[1]}"
        )
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    mean, scale = train_features.double().mean(0), train_features.double().std(0, correction=0)
    scale = scale.where(scale > 1e-12, 1.0)
    x = (train_features.double() - mean) / scale
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, train_labels) + l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        named = (((test_features.double() - mean) / scale) @ weight + bias).argmax(1)
    confusion = torch.bincount(test_labels * classes + named, minlength=classes**2).reshape(classes, classes).cpu()
    present = confusion.sum(1) > 0
    majority = torch.bincount(train_labels).argmax()
    return ProbeResult(
        accuracy=float((named == test_labels).double().mean()),
        majority_accuracy=float((test_labels == majority).double().mean()),
        balanced_accuracy=float((confusion.diagonal()[present] / confusion.sum(1)[present]).mean()),
        train_rows=len(train_labels),
        test_rows=len(test_labels),
        confusion=confusion,
    )


def one_hot_codes(indices: Tensor, codebook_size: int) -> Tensor:
    """Codes (N, tokens) int64 in [0, K) -> (N, tokens · K) float32: the features of a probe on codes.

    Raises:
        ValueError: indices is not (N, tokens), or a code is outside [0, K).
    """
    _check_codes(indices, codebook_size)
    return F.one_hot(indices, codebook_size).flatten(1).float()


@dataclass(frozen=True)
class CodeUsage:
    """How the codes are used.

    Attributes:
        counts: (tokens, K) int64: rows by token and code.
        used: codes that any token uses.
        perplexity: exp of the entropy of the code frequencies, all tokens together; K when all are equally frequent.
        token_perplexity: the same for each token.
        words: distinct combinations of codes over the tokens.
    """

    counts: Tensor
    used: int
    perplexity: float
    token_perplexity: tuple[float, ...]
    words: int


def code_usage(indices: Tensor, codebook_size: int) -> CodeUsage:
    """Counts the codes (N, tokens) int64 in [0, K).

    Raises:
        ValueError: indices is not (N, tokens), is empty, or a code is outside [0, K).
    """
    _check_codes(indices, codebook_size)
    counts = F.one_hot(indices.cpu(), codebook_size).sum(0)
    return CodeUsage(
        counts=counts,
        used=int((counts.sum(0) > 0).sum()),
        perplexity=_perplexity(counts.sum(0)),
        token_perplexity=tuple(_perplexity(row) for row in counts),
        words=len(torch.unique(indices, dim=0)),
    )


def _perplexity(counts: Tensor) -> float:
    p = counts.double() / counts.sum()
    return float(torch.special.entr(p).sum().exp())


def _check_codes(indices: Tensor, codebook_size: int) -> None:
    if indices.ndim != 2 or indices.dtype != torch.int64 or not indices.numel():
        raise ValueError(f"indices is {tuple(indices.shape)} {indices.dtype}; it must be (N, tokens) int64, not empty")
    low, high = (int(v) for v in indices.aminmax())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"indices range from {low} to {high}; they must be in [0, {codebook_size - 1}]")
