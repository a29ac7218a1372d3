"""The vector forms of the exponential and the logarithm, against fp64."""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest

from lamkernels.ops.elementary import exp_negative, log1p_of_fraction


@numba.njit
def exponentials(x, out):
    for i in range(x.size):
        out[i] = exp_negative(x[i])


@numba.njit
def logarithms(x, out):
    for i in range(x.size):
        out[i] = log1p_of_fraction(x[i])


@pytest.mark.parametrize(("dtype", "error"), [(np.float32, 2.0**-22), (np.float64, 2.0**-51)])
def test_relative_error(dtype, error):
    generator = np.random.default_rng(0)
    x = -np.concatenate([generator.uniform(0, 87, 100_000), np.logspace(-30, 0, 1000), [0.0, math.log(2) / 2]])
    x = x[x > -86.9].astype(dtype)
    out = np.empty_like(x)
    exponentials(x, out)
    assert np.abs(out.astype(np.float64) / np.exp(x.astype(np.float64)) - 1).max() <= error
    fraction = np.concatenate([generator.uniform(0, 1, 100_000), np.logspace(-37, 0, 1000)]).astype(dtype)
    out = np.empty_like(fraction)
    logarithms(fraction, out)
    assert np.abs(out.astype(np.float64) / np.log1p(fraction.astype(np.float64)) - 1).max() <= error


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits(dtype):
    x = np.array([0.0, -0.0, -1000.0, -np.inf, np.finfo(dtype).min], dtype)
    out = np.empty_like(x)
    exponentials(x, out)
    assert out.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    logarithms(np.zeros(5, dtype), out)
    assert (out == 0).all()
