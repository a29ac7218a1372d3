"""Modules: bottlenecks of latent action models, fused."""

from lamkernels.nn.fsq import FSQ
from lamkernels.nn.health import CodebookHealth, HealthReport
from lamkernels.nn.lfq import LFQ
from lamkernels.nn.simvq import SimVQ
from lamkernels.nn.vector_quantize import VectorQuantize

__all__ = ["FSQ", "LFQ", "CodebookHealth", "HealthReport", "SimVQ", "VectorQuantize"]
