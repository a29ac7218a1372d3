"""codebook_entropy for the triton backend: its time is matrix products, which torch's library does."""

from lamkernels.ops.codebook_entropy.blocked import codebook_entropy, codebook_entropy_backward

__all__ = ["codebook_entropy", "codebook_entropy_backward"]
