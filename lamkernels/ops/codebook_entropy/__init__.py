"""codebook_entropy: the entropy of the mean code distribution of factorised bits, without a row per code."""
