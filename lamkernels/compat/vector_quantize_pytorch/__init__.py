"""Drop-in forms of vector-quantize-pytorch (VQP): ``VectorQuantize``, ``ResidualVQ``, ``FSQ``, ``LFQ``, ``SimVQ``.

    -from vector_quantize_pytorch import VectorQuantize
    +from lamkernels.compat.vector_quantize_pytorch import VectorQuantize

Constructors, forwards, returns, attributes, methods and state_dict keys are those of VQP 1.32.0. What is not fused runs
in the installed package, and without it raises an ImportError that names the option; names that are not here, such as
``ResidualSimVQ``, are the installed package's own. The guide (docs/guides/vector-quantize-pytorch.md) has the table.
"""

from __future__ import annotations

from typing import Any

from lamkernels.compat.vector_quantize_pytorch._upstream import upstream_name
from lamkernels.compat.vector_quantize_pytorch.fsq import FSQ
from lamkernels.compat.vector_quantize_pytorch.lfq import LFQ
from lamkernels.compat.vector_quantize_pytorch.residual_fsq import ResidualFSQ
from lamkernels.compat.vector_quantize_pytorch.residual_vq import GroupedResidualVQ, ResidualVQ
from lamkernels.compat.vector_quantize_pytorch.sim_vq import SimVQ
from lamkernels.compat.vector_quantize_pytorch.vector_quantize import LossBreakdown, VectorQuantize

__all__ = [
    "FSQ",
    "LFQ",
    "GroupedResidualVQ",
    "LossBreakdown",
    "ResidualFSQ",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
]


def __getattr__(name: str) -> Any:
    """A public name of the installed package that has no fused form."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return upstream_name(__name__, name)
