"""What the Triton kernels share: the scores of a codebook that fits one tile, the fp64 scan, and small host helpers.

Scores of the fp32 path are ``½‖c−μ‖² − (x−μ)·(c−μ)``. The half norms are computed in fp64 from exact differences and
stored relative to the smallest one, so that codes of equal norm do not lose their difference to a large common term,
and they are added after the product.
"""

# mypy: allow-untyped-decorators
# (Triton ships no types)
from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from lamkernels import tuning
from lamkernels.ops.constants import COSINE_EPS

HALVES = (torch.float16, torch.bfloat16)
SMALLEST_CODE = tl.constexpr(2.0**-40)  # below it the fp32 product of two entries may underflow
LARGEST_PRODUCT = tl.constexpr(2.0**120)  # above it an fp32 sum of products may overflow
LARGEST_SQUARED = tl.constexpr(2.0**58)  # a sum of squares of 2¹² such entries and a code's norm stays finite
LARGEST_SINGLE = tl.constexpr(3.4e38)  # still finite when rounded to tf32
COSINE_CLAMP = tl.constexpr(COSINE_EPS)
SMALLEST_UNIT = tl.constexpr(1e-37)  # what the largest entry of a row is clamped to: its inverse is a normal number
FEW_PRODUCTS = tl.constexpr(2048)  # of a tile, to each step
LARGEST_DOUBLE = tl.constexpr(1.7976931348623157e308)


@triton.jit
def is_finite(value: tensor) -> tensor:
    return tl.abs(value) < float("inf")  # false for NaN too


@triton.jit
def finite_rows(entry: tensor, BD: tl.constexpr) -> tensor:
    """Whether all entries [BN, BD] of each row are finite; a sum, because LLVM puts a minimum of flags on the stack."""
    return tl.sum(is_finite(entry).to(tl.int32), axis=1) == BD


@triton.jit
def finite_in_memory(first: tensor, step: tensor, wanted: tensor, dim: tensor, BD: tl.constexpr) -> tensor:
    """Whether all entries of each wanted row [BN] are finite; ``first`` points to their first, ``step`` to the next."""
    finite = wanted
    for start in range(0, dim, BD):
        d = start + tl.arange(0, BD)
        inside = finite[:, None] & (d < dim)[None, :]  # [BN, BD]
        entry = tl.load(first[:, None] + d[None, :] * step, mask=inside, other=0.0)
        if entry.dtype != tl.float64:
            entry = entry.to(tl.float32)
        finite = finite & (tl.min(is_finite(entry).to(tl.int32), axis=1) > 0)
    return finite


@triton.jit
def power_above(size: tensor) -> tensor:
    """2^⌈log2 size⌉ of fp32 numbers that are not negative: 0 for 0, and infinite past the range."""
    return ((size.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def grid_centre(mean: tensor, variance: tensor) -> tensor:
    """The column mean rounded to a multiple of 2^⌈log2 rms⌉, the mean itself where rms is 0, and 0 on overflow.

    The grid keeps x − μ exact for integer data, so that exact ties stay exact.
    """
    rms = tl.sqrt(variance)
    step = power_above(rms)
    usable = is_finite(mean) & is_finite(rms) & is_finite(step)
    mean = tl.where(usable, mean, 0.0)
    grid = tl.where(usable & (step > 0), step, 1.0).to(tl.float64)
    rounded = (tl.floor(mean.to(tl.float64) / grid + 0.5) * grid).to(tl.float32)
    return tl.where(usable, tl.where(rms > 0, rounded, mean), 0.0)


@triton.jit
def product_limit(largest_code: tensor, largest_norm: tensor, dim: tensor) -> tensor:
    """The largest |x − μ| entry whose fp32 scores are safe; −1 where none is: the codes are too large or too small."""
    limit = LARGEST_PRODUCT / (tl.maximum(largest_code, SMALLEST_CODE) * dim)
    safe = (largest_norm < LARGEST_PRODUCT) & ((largest_code >= SMALLEST_CODE) | (largest_code == 0.0))
    return tl.where(safe, tl.minimum(limit, LARGEST_PRODUCT), -1.0)


@triton.jit
def load_rows(
    first: tensor, left: tensor, step: tensor, step_d: tensor,
    DENSE: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> tensor:  # fmt: skip
    """Entries [BN, BD] of the next ``left`` of BN rows, 0 elsewhere; ``first`` points to the first of them.

    Rows without gaps (DENSE) that fill the tile are loaded as one run, 16 bytes at a time also where a row has fewer;
    else their distance is a constant, so that the compiler knows how they are aligned.
    """
    if DENSE and DIM == BD:
        flat = tl.arange(0, BN * BD)
        entry = tl.reshape(tl.load(first + flat, mask=flat < left * DIM, other=0.0), [BN, BD])
    else:
        n, d = tl.arange(0, BN), tl.arange(0, BD)
        inside = (n < left)[:, None] & (d < DIM)[None, :]  # [BN, BD]
        if DENSE:
            entry = tl.load(first + (n * DIM)[:, None] + d[None, :], mask=inside, other=0.0)
        else:
            at = n.to(tl.int64)[:, None] * step + d.to(tl.int64)[None, :] * step_d
            entry = tl.load(first + at, mask=inside, other=0.0)
    return entry


@triton.jit
def store_rows(
    first: tensor, left: tensor, value: tensor, DIM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
) -> None:  # fmt: skip
    """Stores the next ``left`` of BN rows [BN, BD] without gaps, from ``first`` on."""
    if DIM == BD:
        flat = tl.arange(0, BN * BD)
        tl.store(first + flat, tl.reshape(value, [BN * BD]), mask=flat < left * DIM)
    else:
        n, d = tl.arange(0, BN), tl.arange(0, BD)
        tl.store(first + (n * DIM)[:, None] + d[None, :], value, mask=(n < left)[:, None] & (d < DIM)[None, :])


@triton.jit
def first_entries(x: tensor, row: tensor, x_b: tensor, x_l: tensor, x_n: tensor) -> tensor:
    """Pointers to the first entry of each row [BN]; see :func:`rows_in_place` for the strides."""
    return x + row // x_l * x_b + row % x_l * x_n


@triton.jit
def must_scan(largest: tensor, limit: tensor, dim: tensor, L2: tl.constexpr) -> tensor:
    """Whether fp32 must not decide rows [BN] whose largest entry is this: a sum may overflow, or every product vanish.

    ``limit`` is 2¹²⁰ / (D · largest code), so the second test is largest entry · largest code < 2⁻¹⁰⁰.
    """
    again = (largest > limit) | (largest == float("inf"))
    if not L2:
        again = again | ((largest > 0) & (largest < limit * 2.0**-110 * (dim * 2.0**-110)))
    return again


@triton.jit
def closeness(before: tensor, after: tensor) -> tensor:
    """What the centre gains for each code in digits: log of its squared distance from 0 over that from the centre.

    Where the sum is not positive, there is no centre: the mean of codes thrown far out would cost those that are left,
    and all the rows beside these, their digits. A code of zeros does not decide alone.
    """
    ratio = (before + 1e-30) / (after + 1e-30)
    return tl.log(tl.minimum(tl.maximum(ratio, 1e-10), 1e30).to(tl.float32))


@triton.jit
def resident_norms(
    codebook: tensor, stride: tensor, num_codes: tensor, dim: tensor,
    L2: tl.constexpr, CENTRE: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
) -> tensor:  # fmt: skip
    """Of a codebook that fits one tile: its centre [BD], half norms [BK], and product limit ()."""
    k = tl.arange(0, BK)
    d = tl.arange(0, BD)
    inside = (k < num_codes)[:, None] & (d < dim)[None, :]  # [BK, BD]
    code = tl.load(codebook + k.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    finite = (tl.min(is_finite(code).to(tl.int32), axis=1) > 0) & (k < num_codes)  # [BK]
    code = tl.where(finite[:, None], code, 0.0)
    centre = tl.zeros([BD], tl.float32)
    if CENTRE:
        count = tl.maximum(tl.sum(finite.to(tl.float32), axis=0), 1.0)
        mean = tl.div_rn(tl.sum(code, axis=0), count + tl.zeros([BD], tl.float32))
        deviation = tl.where(finite[:, None], code - mean[None, :], 0.0)
        centre = grid_centre(mean, tl.sum(deviation * deviation, axis=0) / count)
        wide = code.to(tl.float64)
        off = tl.where(finite[:, None], wide - centre.to(tl.float64)[None, :], 0.0)
        gain = tl.where(finite, closeness(tl.sum(wide * wide, axis=1), tl.sum(off * off, axis=1)), 0.0)
        centre = tl.where(tl.sum(gain, axis=0) > 0, centre, 0.0)
    largest_code = tl.max(tl.max(tl.where(finite[:, None], tl.abs(code - centre[None, :]), 0.0), axis=1), axis=0)
    difference = tl.where(finite[:, None], code.to(tl.float64) - centre.to(tl.float64)[None, :], 0.0)
    half_norm = tl.sum(difference * difference, axis=1) * 0.5  # [BK]
    smallest = tl.min(tl.where(finite, half_norm, float("inf")), axis=0)
    relative = tl.where(finite, half_norm - smallest, 0.0).to(tl.float32)
    limit = product_limit(largest_code, tl.max(tl.where(finite, half_norm, 0.0), axis=0).to(tl.float32), dim)
    if not L2:
        relative = tl.zeros([BK], tl.float32)
    return centre, tl.where(finite, relative, float("inf")), limit


@triton.jit
def nearest_resident(
    x: tensor, codebook: tensor, stride: tensor, dim: tensor, centre: tensor, half_norm: tensor,
    CENTRE: tl.constexpr, NATIVE: tl.constexpr, DOT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
) -> tensor:  # fmt: skip
    """Index [BN] of the nearest code of each row, −1 without a finite code.

    The codes are loaded again for each tile of rows: they come from the cache, and would not fit the registers.
    """
    k = tl.arange(0, BK)
    d = tl.arange(0, BD)
    inside = (half_norm < float("inf"))[:, None] & (d < dim)[None, :]  # [BK, BD]
    code = tl.load(codebook + k.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)
    if NATIVE:
        product = tl.dot(x, tl.trans(code), input_precision="ieee", out_dtype=tl.float32)
    else:
        centred = code.to(tl.float32)
        if CENTRE:
            centred = tl.where(inside, centred - centre[None, :], 0.0)
        product = dot(less_centre(x, centre, CENTRE), tl.trans(centred), DOT)
    score = half_norm[None, :] - product  # [BN, BK]
    best = tl.min(score, axis=1)
    index = tl.min(tl.where(score == best[:, None], k[None, :], BK), axis=1)
    return tl.where(best < float("inf"), index, -1)


@triton.jit
def dot(a: tensor, b: tensor, DOT: tl.constexpr) -> tensor:
    """a·b in fp32, of doubles in fp64.

    "split" is the three TF32 products that Triton makes of "tf32x3", less what it does for NaN and infinity: here they
    spoil a row or a column that something else decides. A product ignores the bits that tf32 lacks. Small tiles wait
    for each product, so there the last of the three does not wait for the others.
    """
    wide = tl.float64 if a.dtype == tl.float64 else tl.float32
    if DOT == "split":
        a_high, b_high = round_to_tf32(a), round_to_tf32(b)
        small = tl.dot(a - a_high, b_high, input_precision="tf32", out_dtype=wide)
        small = tl.dot(a_high, b - b_high, small, input_precision="tf32")
        if a.shape[0] * b.shape[1] <= FEW_PRODUCTS:
            product = tl.dot(a_high, b_high, input_precision="tf32", out_dtype=wide) + small
        else:
            product = tl.dot(a_high, b_high, small, input_precision="tf32")
    else:
        product = tl.dot(a, b, input_precision=DOT, out_dtype=wide)
    return product


@triton.jit
def doubt(
    x: tensor, centre: tensor, limit: tensor, dim: tensor, L2: tl.constexpr, CENTRE: tl.constexpr
) -> tensor:  # fmt: skip
    """What :func:`is_doubtful` takes, of entries x [BN, BD] alone or as a maximum over tiles."""
    if L2:  # as bits a NaN is larger than an infinity
        found = less_centre(x, centre, CENTRE).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        found = rows_to_scan(x, centre, limit, dim, L2, CENTRE).to(tl.int32)
    return found


@triton.jit
def is_doubtful(found: tensor, limit: tensor, L2: tl.constexpr) -> tensor:
    """Whether there may be :func:`rows_to_scan`; where there are none, the squares of x − μ do not overflow either."""
    largest = tl.max(found)
    doubtful = largest > 0
    if L2:
        doubtful = (largest.to(tl.float32, bitcast=True) <= tl.minimum(limit, LARGEST_SQUARED)) == 0
    return doubtful


@triton.jit
def less_centre(x: tensor, centre: tensor, CENTRE: tl.constexpr) -> tensor:
    wide = x.to(tl.float32)
    if CENTRE:
        wide = wide - centre[None, :]
    return wide


@triton.jit
def rows_to_scan(
    x: tensor, centre: tensor, limit: tensor, dim: tensor, L2: tl.constexpr, CENTRE: tl.constexpr
) -> tensor:  # fmt: skip
    """Whether fp32 must not decide each row [BN]."""
    size = tl.abs(less_centre(x, centre, CENTRE))
    return must_scan(tl.max(tl.where(size <= limit, size, float("inf")), axis=1), limit, dim, L2)


@triton.jit
def scan_exactly(
    rows: tensor, step: tensor, wanted: tensor, codebook: tensor, stride: tensor, num_codes: tensor, dim: tensor,
    L2: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> tensor:  # fmt: skip
    """The fp64 minimum over all codes of the wanted rows of a tile: index [BN], −1 if a row is not finite, and score.

    ``rows`` [BN] points to the first entry of each row, ``step`` leads to the next. The codes are not read when no
    ``wanted`` row is finite.
    """
    finite = wanted
    for d in range(dim):
        finite = finite & is_finite(tl.load(rows + d * step, mask=wanted, other=0.0).to(tl.float64))
    index = tl.full([BN], -1, tl.int32)
    best = tl.full([BN], float("inf"), tl.float64)
    if tl.max(finite.to(tl.int32), axis=0) > 0:
        for start in range(0, num_codes, BK):
            k = start + tl.arange(0, BK)
            usable = k < num_codes  # [BK]
            score = tl.zeros([BN, BK], tl.float64)
            for d in range(dim):
                entry = tl.load(rows + d * step, mask=finite, other=0.0).to(tl.float64)[:, None]
                code = tl.load(codebook + k.to(tl.int64) * stride + d, mask=k < num_codes, other=0.0).to(tl.float64)
                usable = usable & is_finite(code)
                if L2:
                    score += (entry - code[None, :]) * (entry - code[None, :])
                else:
                    score -= entry * code[None, :]
            # a score past the range of fp64 is worst, but not worse than a code that is not finite
            score = tl.where(score < LARGEST_DOUBLE, score, LARGEST_DOUBLE)
            score = tl.where(usable[None, :], score, float("inf"))
            tile_best = tl.min(score, axis=1)
            tile_index = tl.min(tl.where(score == tile_best[:, None], k[None, :], 2147483647), axis=1)
            better = finite & (tile_best < best)
            index = tl.where(better, tile_index, index)
            best = tl.where(better, tile_best, best)
    return index, best


@triton.jit
def chosen_score(
    rows: tensor, step: tensor, index: tensor, codebook: tensor, stride: tensor, dim: tensor,
    L2: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> tensor:  # fmt: skip
    """Σ(x − c)², or x·c, of each row [BN] and its code in fp32, from the entries: no cancellation as in the scores."""
    total = tl.zeros([BN], tl.float32)
    code = codebook + index.to(tl.int64) * stride
    for start in range(0, dim, BD):
        d = start + tl.arange(0, BD)
        inside = (index >= 0)[:, None] & (d < dim)[None, :]  # [BN, BD]
        entry = tl.load(rows[:, None] + d[None, :] * step, mask=inside, other=0.0).to(tl.float32)
        chosen = tl.load(code[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if L2:
            total += tl.sum((entry - chosen) * (entry - chosen), axis=1)
        else:
            total += tl.sum(entry * chosen, axis=1)
    return total


@triton.jit
def unit_scales(
    rows: tensor, step: tensor, wanted: tensor, dim: tensor,
    WIDE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
) -> tensor:  # fmt: skip
    """Two factors [BN] whose product is 1 / ‖x‖ of each wanted row, the norm clamped as for the cosine.

    Two, so that neither a large nor a small row leaves the range of fp32 on the way: x · first is at most 1.
    """
    largest = tl.zeros([BN], WIDE)
    for start in range(0, dim, BD):
        d = start + tl.arange(0, BD)
        entry = tl.load(rows[:, None] + d[None, :] * step, mask=wanted[:, None] & (d < dim)[None, :], other=0.0).to(
            WIDE
        )
        largest = tl.maximum(largest, tl.max(tl.abs(entry), axis=1))
    first = 1.0 / tl.maximum(largest, SMALLEST_UNIT)
    square = tl.zeros([BN], WIDE)
    for start in range(0, dim, BD):
        d = start + tl.arange(0, BD)
        entry = tl.load(rows[:, None] + d[None, :] * step, mask=wanted[:, None] & (d < dim)[None, :], other=0.0).to(
            WIDE
        )
        entry = entry * first[:, None]
        square += tl.sum(entry * entry, axis=1)
    length = tl.sqrt(square)
    clamped = largest * length < COSINE_CLAMP
    return tl.where(clamped, 1.0 / COSINE_CLAMP, first), tl.where(clamped, 1.0, 1.0 / tl.maximum(length, 1e-30))


@triton.jit
def squared_norm(residual: tensor) -> tensor:
    """Σ r² of each row [BN] in fp64; rows whose squares overflow fp32 are scaled first."""
    square = tl.sum(residual * residual, axis=1).to(tl.float64)
    if tl.max(square, axis=0) == float("inf"):
        small = residual * 2.0**-70
        square = tl.sum(small * small, axis=1).to(tl.float64) * 2.0**140
    return square


@triton.jit
def round_to_tf32(value: tensor) -> tensor:
    return ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def grouped_sum(member: tensor, value: tensor, DOT: tl.constexpr) -> tensor:
    """Sums [BG, BD] of the rows of ``value`` [BN, BD] that are members [BG, BN] of each group.

    The one-hot factor is exact in tf32, so two products do, of the two halves of ``value``: an error of 2⁻²³ of it. The
    product ignores the bits of the lower half that tf32 lacks.
    """
    if value.dtype == tl.float64:
        total = tl.sum(tl.where(member[:, :, None], value[None, :, :], 0.0), axis=1)
    else:  # clamped, because an infinity would reach every group as 0 · inf
        value = tl.minimum(tl.maximum(value, -LARGEST_SINGLE), LARGEST_SINGLE)
        one_hot = member.to(tl.float32)
        if DOT == "ieee":
            total = tl.dot(one_hot, value, input_precision="ieee", out_dtype=tl.float32)
        else:
            high = round_to_tf32(value)
            total = tl.dot(one_hot, high, input_precision="tf32", out_dtype=tl.float32)
            total = tl.dot(one_hot, value - high, total, input_precision="tf32")
    return total


class Arithmetic(NamedTuple):
    """How the scores of one call are computed: compile-time arguments of the kernels."""

    exact: bool  # fp64 differences over all codes
    centre: bool  # fp32 rows: subtract the grid centre of the codes
    native: bool  # product of two equal half types, accumulated in fp32
    dot: str  # how fp32 is multiplied: an input_precision, or "split", see :func:`dot`


def arithmetic(x: Tensor, codebook: Tensor, metric: str, precision: str, target: str) -> Arithmetic:
    """Half rows are not centred: x − μ is not a half number, and their error bound has no term that would gain."""
    exact = precision == "exact" or x.dtype == torch.float64
    # the interpreter multiplies bf16 as bit patterns; the fp32 products of the same entries are exact as well
    native = (
        x.dtype in HALVES and codebook.dtype == x.dtype and not (target == "interpreter" and x.dtype == torch.bfloat16)
    )
    dot = "tf32" if precision == "fast" and x.dtype == torch.float32 else fp32_product(target)
    return Arithmetic(exact, metric == "l2" and x.dtype == torch.float32, native, "ieee" if native else dot)


def fp32_product(target: str) -> str:
    """What :func:`dot` takes to keep about 22 bits of both factors; TF32 does not compile for AMD."""
    if target.startswith("gfx"):
        return "ieee"
    return "split" if tuning.loads_ahead(target) else "tf32x3"


def unit_inner(tensor: Tensor) -> Tensor:
    """The tensor itself where neighbours of the last axis are neighbours in memory, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def dense_rows(x: Tensor) -> bool:
    """Whether the rows of x (H, N, D) lie side by side in memory, within a head."""
    _, rows, dim = x.shape
    return (dim == 1 or x.stride(2) == 1) and (rows == 1 or x.stride(1) == dim)


def head_stride(x: Tensor) -> int:
    """The distance of heads; 0, which the compiler knows to be aligned, where there is one."""
    return x.stride(0) if x.shape[0] > 1 else 0


def rows_in_place(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """x (H, N, D) or (H, B, L, D), and its strides as kernels take them: of heads, groups, L, of rows, of entries.

    L = 1 and an entry stride of 1 become constants when a kernel is compiled, and cost nothing. A row that spans more
    than int32 can count is copied.
    """
    if x.shape[-1] * x.stride(-1) >= 2**31:
        x = x.contiguous()
    entry = x.stride(-1) if x.shape[-1] > 1 else 1
    if x.ndim == 3:
        return x, (x.stride(0), x.stride(1), 1, 1, entry)
    return x, (x.stride(0), x.stride(1), x.shape[2], x.stride(2), entry)


NO_CHANGE = contextlib.nullcontext()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensor; mostly it is."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return NO_CHANGE
    return torch.cuda.device(tensor.device)


@functools.cache
def persistent_programs(device: torch.device) -> int:
    """How many programs a persistent kernel gets: a fixed number per device, since the partition decides the bits."""
    if device.type != "cuda":
        return 3
    return tuning.PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)
