"""Fused kernels for the bottlenecks of latent action models, as drop-in torch modules and functions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lamkernels import ops as _ops  # noqa: F401  (registers the operators)
from lamkernels._version import __version__
from lamkernels.backend import BackendStatus, available_backends
from lamkernels.covariance import Covariance
from lamkernels.functional import VQOutput, code_statistics, lookup, nearest_code, vector_quantize
from lamkernels.graphs import Graphed
from lamkernels.joint_moments import Moments, moments, off_diagonal_covariance_loss
from lamkernels.lookup_free import (
    LFQOutput,
    finite_scalar_codes,
    finite_scalar_quantize,
    lookup_free_codes,
    lookup_free_quantize,
)
from lamkernels.nn import FSQ, LFQ, CodebookHealth, HealthReport, SimVQ, VectorQuantize

if TYPE_CHECKING:
    from lamkernels import compat, lam
    from lamkernels.labelling import label


__all__ = [
    "FSQ",
    "LFQ",
    "BackendStatus",
    "CodebookHealth",
    "Covariance",
    "Graphed",
    "HealthReport",
    "LFQOutput",
    "Moments",
    "SimVQ",
    "VQOutput",
    "VectorQuantize",
    "__version__",
    "available_backends",
    "code_statistics",
    "compat",
    "finite_scalar_codes",
    "finite_scalar_quantize",
    "label",
    "lam",
    "lookup",
    "lookup_free_codes",
    "lookup_free_quantize",
    "moments",
    "nearest_code",
    "off_diagonal_covariance_loss",
    "vector_quantize",
]


def __getattr__(name: str) -> Any:
    """``lamkernels.compat``, ``lamkernels.lam`` and ``lamkernels.label`` are loaded when they are first used."""
    if name in ("compat", "lam"):
        return importlib.import_module(f"lamkernels.{name}")
    if name == "label":
        return importlib.import_module("lamkernels.labelling").label
    raise AttributeError(f"module 'lamkernels' has no attribute {name!r}")
