"""Elementary functions that LLVM turns into vector code, for loops over contiguous arrays in the Numba kernels.

Calls of libm stay scalar, ten times slower. In fp32 the functions here are polynomials without a branch, with an error
of about 2⁻²²; in fp64 they are libm's.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
SMALLEST = np.float32(-87.0)  # its exponential is still a normal number
# of (eʳ − 1 − r) / r², minimax for |r| ≤ ½ ln 2, the highest degree first (Cephes, expf)
EXP = [np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1)]
HALF, ONE, BIAS, MANTISSA = np.float32(0.5), np.float32(1.0), np.int32(127), np.int32(23)
E0, E1, E2, E3, E4 = EXP
# log((1 + r) / (1 − r)) / 2r = 1 + r²/3 + r⁴/5 + …
L1, L2, L3, L4, L5, L6, L7 = (np.float32(1 / k) for k in (3, 5, 7, 9, 11, 13, 15))
STRICT = {"contract"}  # reassociation would undo the reduction in two steps


def exp_negative(x):
    """eˣ of a float32 or float64 scalar x ≤ 0; 0 from −87 on in float32."""
    raise NotImplementedError("for compiled code")


@overload(exp_negative, inline="never", jit_options={"fastmath": STRICT})
def _exp_negative(x):
    if x != types.float32:
        return lambda x: math.exp(x)

    def single(x):
        clamped = max(x, SMALLEST)
        k = np.floor(clamped * LOG2_E + HALF)
        r = (clamped - k * LN2_HIGH) - k * LN2_LOW
        series = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + HALF
        power = np.int32((np.int32(k) + BIAS) << MANTISSA).view(np.float32)  # 2ᵏ
        value = (series * r * r + r + ONE) * power
        return value if x > SMALLEST else np.float32(0.0)

    return single


def log1p_of_fraction(x):
    """log(1 + x) of a float32 or float64 scalar in [0, 1], to relative accuracy also where x is tiny."""
    raise NotImplementedError("for compiled code")


@overload(log1p_of_fraction, inline="never", jit_options={"fastmath": STRICT})
def _log1p_of_fraction(x):
    if x != types.float32:
        return lambda x: math.log1p(x)

    def single(x):
        r = x / (x + np.float32(2.0))  # at most 1/3
        s = r * r
        series = ((((((L7 * s + L6) * s + L5) * s + L4) * s + L3) * s + L2) * s + L1) * s + ONE
        return np.float32(2.0) * r * series

    return single
