"""Modules: bottlenecks of latent action models, fused."""

from lamkernels.nn.vector_quantize import VectorQuantize

__all__ = ["VectorQuantize"]
