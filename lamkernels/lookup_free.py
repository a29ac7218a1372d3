"""Public functions of the quantisers without a learned codebook: finite scalar (FSQ) and lookup-free (LFQ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lamkernels.backend import resolve
from lamkernels.eager import in_shape, is_plain
from lamkernels.one_call import numba_kernels
from lamkernels.ops.codebook_entropy.clamped import over_all_codes
from lamkernels.ops.codebook_entropy.op import codebook_entropy as _codebook_entropy
from lamkernels.ops.finite_scalar_quantize.levels import BOUNDED, SYMMETRIC, bound, strides
from lamkernels.ops.finite_scalar_quantize.op import finite_scalar_quantize as _finite_scalar_quantize
from lamkernels.ops.lookup_free_quantize.op import lookup_free_quantize as _lookup_free_quantize
from lamkernels.validation import (
    BACKENDS,
    FLOATS,
    Backend,
    check_float,
    check_indices,
    check_levels,
    check_mask,
    check_option,
    check_positive,
    refuse_tangents,
)

Zero = Literal["negative", "zero"]
ZEROS = get_args(Zero)
MAX_BITS = 62  # of an int64 index
MAX_ENTROPY_BITS = 24  # beyond, one distribution over all codes takes more than 256 MiB


class LFQOutput(NamedTuple):
    """What :func:`lookup_free_quantize` returns. Losses are fp32, fp64 for fp64 x.

    Attributes:
        quantized: (..., D) in the dtype of x: s times the sign of each entry; NaN for a row that is not finite, 0 for a
            masked row.
        indices: (...,) int64: the signs as a binary number, the first entry its highest bit, 1 where x > 0; −1 for a
            row that is not finite or is masked.
        commitment_loss: (): mean((x − sg q)²) over the rows that are in.
        sample_entropy: (): the mean over these rows of the entropy, in nats, of a row's code distribution.
        codebook_entropy: (): the entropy, in nats, of the mean of these distributions; None where not asked for.
    """

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor | None


def lookup_free_quantize(
    x: Tensor,
    *,
    scale: float = 1.0,
    inv_temperature: float = 100.0,
    zero: Zero = "negative",
    mask: Tensor | None = None,
    codebook_entropy: bool = True,
    backend: Backend = "auto",
) -> LFQOutput:
    """Lookup-free quantisation (LFQ, Yu et al. 2024): every entry becomes its sign, and the signs are the index.

    A row's code distribution is softmax(2β x·c) over the 2^D codes c in {−s, s}^D (equation 5 of the paper, with
    distances for logits). It is a product of D independent bits with probabilities σ(4βs·x_d), so that its entropy is
    Σ_d H(σ(4βs·x_d)): the same pass as the signs, O(N·D), and no N × 2^D matrix. The gradient of ``quantized`` passes
    straight through to x.

    The entropy of the mean distribution has no such form. It costs 2·N·2^D operations, twice that backward, as matrix
    products of factors over half of the bits (26 Gflop a step at D = 18, N = 16384), and O(2^D) memory besides a fixed
    block of rows. On a GPU its products follow ``torch.set_float32_matmul_precision``. Under
    ``torch.distributed`` it is that of the rows of this process.

    No logarithm is clamped. Implementations that clamp the probability inside it at 1e-5 or 1e-6 give less entropy
    where many codes share the mass: 1e-4 less at D = 8, more for larger D.

    Args:
        x: (..., D), D at most 62; float32, float16, bfloat16 or float64, any strides.
        scale: s, the magnitude of the codes' entries.
        inv_temperature: β of the code distribution.
        zero: what an entry of zero becomes: "negative", −s, or "zero", 0. Its bit is 0 either way.
        mask: (...,) bool, False for a row to leave out; None means that all rows are in.
        codebook_entropy: False leaves the entropy of the mean distribution out; it needs D of at most 24.
        backend: as for :func:`nearest_code`.

    Returns:
        An :class:`LFQOutput`. A row that is not finite or is masked is in no loss and has a gradient of zero; with no
        row in, the losses are 0.

    Raises:
        TypeError: x or mask is not a tensor of a supported dtype.
        ValueError: a shape, device or option does not fit; the message names it and what is allowed.
        RuntimeError: the backend asked for cannot run here.
    """
    check_float("x", x)
    refuse_tangents(x)
    check_positive("scale", scale)
    check_positive("inv_temperature", inv_temperature)
    check_option("zero", zero, ZEROS)
    check_option("backend", backend, BACKENDS)
    if mask is not None:
        check_mask(mask, x)
    dim = x.shape[-1]
    check_bits(dim, codebook_entropy)
    logit_scale, keep_zero = 4.0 * inv_temperature * scale, zero == "zero"
    if is_plain(*(x,) if mask is None else (x, mask)) and resolve(backend, "cpu") == "numba":
        kernels = numba_kernels("lookup_free_quantize")
        quantized, indices, commitment, sample_entropy = kernels.quantize(x, mask, scale, logit_scale, keep_zero)
    else:
        quantized, indices, *losses = _lookup_free_quantize(
            x.reshape(1, -1, dim), None if mask is None else mask.reshape(1, -1), scale, logit_scale, keep_zero,
            backend,
        )  # fmt: skip
        quantized, indices = in_shape(quantized, x.shape), indices.reshape(x.shape[:-1])
        commitment, sample_entropy = losses[0].squeeze(0), losses[1].squeeze(0)
    entropy = None
    if codebook_entropy:
        entropy = _codebook_entropy(x.reshape(1, -1, dim), indices.reshape(1, -1), logit_scale, backend)[0].squeeze(0)
    return LFQOutput(quantized, indices, commitment, sample_entropy, entropy)


def clamped_entropies(x: Tensor, codebook: Tensor, inv_temperature: float, smallest: float) -> tuple[Tensor, Tensor]:
    """The entropies of other implementations, −Σ p log max(p, ε) with p = softmax(2β x·c), for parity with them.

    In one pass on the CPU, else with the N × 2^D matrix.

    Args:
        x: (N, C, D), in the dtype of the codebook or a wider one.
        codebook: (2^D, D): the 2^D rows of ±1, in any order.
        inv_temperature: β.
        smallest: ε.

    Returns:
        The mean over all rows and codebooks, and the mean over codebooks of that of the mean distribution; NaN where
        a row is not finite.
    """
    fits = x.shape[0] > 0 and x.shape[2] <= MAX_ENTROPY_BITS and x.dtype in (torch.float32, torch.float64)
    fits = fits and isinstance(inv_temperature, int | float)
    if fits and is_plain(x, codebook) and resolve("auto", "cpu") == "numba":
        kernels = numba_kernels("codebook_entropy", "numba_clamped")
        entropies: tuple[Tensor, Tensor] = kernels.clamped_entropies(x, codebook, inv_temperature, smallest)
        return entropies
    return over_all_codes(x, codebook, inv_temperature, smallest)


def lookup_free_codes(indices: Tensor, dim: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The code of each index of :func:`lookup_free_quantize`, NaN where the index is −1.

    Args:
        indices: (...,) int64 in [−1, 2^D).
        dim: D, the number of bits, at most 62.
        scale: s, the magnitude of the codes' entries.
        dtype: of the codes.

    Returns:
        (..., D), entries ±s.

    Raises:
        TypeError: indices is not int64, or dtype is not a supported one.
        ValueError: dim or scale is out of range.
        IndexError: on the CPU, an index is below −1 or not below 2^D.
    """
    check_indices(indices)
    check_bits(dim, False)
    check_positive("scale", scale)
    _check_dtype(dtype)
    _check_code_range(indices, 2**dim)
    shift = torch.arange(dim - 1, -1, -1, device=indices.device)
    bits = (indices[..., None] >> shift) & 1
    return ((2 * bits - 1).double() * scale).to(dtype).masked_fill((indices < 0)[..., None], torch.nan)


def check_bits(dim: int, entropy: bool) -> None:
    """A number of bits that an index holds and, for the codebook entropy, that memory holds, else ValueError."""
    if not 1 <= dim <= MAX_BITS:
        raise ValueError(f"x has rows of {dim} entries; lookup-free quantisation takes 1 to {MAX_BITS}, one bit each")
    if entropy and dim > MAX_ENTROPY_BITS:
        raise ValueError(
            f"x has rows of {dim} entries; the codebook entropy takes at most {MAX_ENTROPY_BITS}, "
            "pass codebook_entropy=False (LFQ: diversity_gamma=0) to do without"
        )


def finite_scalar_quantize(
    x: Tensor, levels: Sequence[int], *, symmetric: bool = False, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Finite scalar quantisation (FSQ, Mentzer et al. 2023): every entry is bounded and rounded to one of few levels.

    With L levels, h = (L − 1)(1 + 1e-3) / 2, o = ½ for even L and 0 for odd L, and s = atanh(o / h), an entry z becomes
    round(tanh(z + s)·h − o) / ⌊L / 2⌋ (appendix A.1 of the paper). The gradient passes straight through the rounding:
    that of an entry is h / ⌊L / 2⌋ · (1 − tanh²(z + s)). Two levels lie far from symmetric here, with their edge at
    z = −3.8; ``symmetric`` puts it at 0.

    Entries are compared with the points where the bound crosses a rounding edge, computed in fp64, so that the level is
    that of exact arithmetic on the stored value on every backend and in every dtype.

    Args:
        x: (..., D); float32, float16, bfloat16 or float64, any strides.
        levels: the number of levels of each of the D columns, each in [2, 65536], their product below 2⁶³.
        symmetric: the L values (2j − L + 1) / (L − 1) in [−1, 1] instead, the nearest to tanh(z), upwards from a tie
            (Parker et al. 2024, section 3.2).
        backend: as for :func:`nearest_code`.

    Returns:
        quantized (..., D) in the dtype of x, and indices (...,) int64: the sum of the levels' positions times the
        product of the levels before, so that the first column changes fastest. A row that is not finite is quantised
        to NaN, has index −1 and a gradient of zero.

    Raises:
        TypeError: x is not a tensor of a supported dtype, or levels are not integers.
        ValueError: the levels do not fit each other or x, or an option is unknown.
        RuntimeError: the backend asked for cannot run here.
    """
    counts = tuple(check_levels(levels))
    check_option("backend", backend, BACKENDS)
    return quantize_entries(x, counts, SYMMETRIC if symmetric else BOUNDED, backend)


def quantize_entries(
    x: Tensor, levels: tuple[int, ...], rounding: int, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`finite_scalar_quantize` of checked levels; ``rounding`` as for :func:`levels.bound`."""
    check_float("x", x)
    refuse_tangents(x)
    if x.shape[-1] != len(levels):
        raise ValueError(f"x has rows of {x.shape[-1]} entries and there are {len(levels)} levels; they must be equal")
    if is_plain(x) and resolve(backend, "cpu") == "numba":
        plain: tuple[Tensor, Tensor] = numba_kernels("finite_scalar_quantize").quantize(x, levels, rounding)
        return plain
    quantized, indices = _finite_scalar_quantize(x.reshape(1, -1, len(levels)), levels, rounding, backend)
    return in_shape(quantized, x.shape), indices.reshape(x.shape[:-1])


def finite_scalar_codes(
    indices: Tensor, levels: Sequence[int], *, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The code of each index of :func:`finite_scalar_quantize`, NaN where the index is −1.

    Args:
        indices: (...,) int64 in [−1, K), K the product of the levels.
        levels: as for :func:`finite_scalar_quantize`.
        symmetric: as for :func:`finite_scalar_quantize`.
        dtype: of the codes.

    Returns:
        (..., D), equal to what :func:`finite_scalar_quantize` returns for rows of ``dtype``.

    Raises:
        TypeError: indices is not int64, levels are not integers, or dtype is not a supported one.
        ValueError: levels are out of range.
        IndexError: on the CPU, an index is below −1 or not below K.
    """
    check_indices(indices)
    counts = check_levels(levels)
    _check_code_range(indices, math.prod(counts))
    _check_dtype(dtype)
    columns = []
    for count, stride in zip(counts, strides(tuple(counts)), strict=True):
        column = bound(count, SYMMETRIC if symmetric else BOUNDED)
        position = indices.div(stride, rounding_mode="floor") % count
        columns.append((position.double() - column.offset) / column.half_width)
    return torch.stack(columns, -1).to(dtype).masked_fill((indices < 0)[..., None], torch.nan)


def _check_code_range(indices: Tensor, num_codes: int) -> None:
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
        try:
            low, high = (int(v) for v in torch.aminmax(indices))
        except RuntimeError:  # under vmap there are no values to look at
            return
        if low < -1 or high >= num_codes:
            raise IndexError(f"indices range from {low} to {high}; they must be in [-1, {num_codes - 1}]")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}; it must be float32, float16, bfloat16 or float64")
