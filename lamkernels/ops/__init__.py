"""The operators: one folder each, registered with ``torch.library`` when this package is imported.

Every operator works on a canonical layout with a leading head axis: ``x`` (H, N, D), ``codebook`` (H, K, D).
:mod:`lamkernels.functional` brings users' shapes into it.
"""

from lamkernels.ops.code_statistics import op as _code_statistics  # noqa: F401  (importing registers the operator)
from lamkernels.ops.codebook_entropy import op as _codebook_entropy  # noqa: F401
from lamkernels.ops.covariance import op as _covariance  # noqa: F401
from lamkernels.ops.finite_scalar_quantize import op as _finite_scalar_quantize  # noqa: F401
from lamkernels.ops.lookup_free_quantize import op as _lookup_free_quantize  # noqa: F401
from lamkernels.ops.nearest_code import op as _nearest_code  # noqa: F401
from lamkernels.ops.vector_quantize import op as _vector_quantize  # noqa: F401
