"""Clamps that the formulas of the operators name; every backend uses these."""

COSINE_EPS = 1e-12  # of the norm that a vector is divided by, as torch's normalize does
ROTATION_EPS = 1e-6  # of the norms in the rotation trick, as vector-quantize-pytorch does
NOISE_EPS = 1e-12  # added to the scale of NSVQ's noise, as its authors do
