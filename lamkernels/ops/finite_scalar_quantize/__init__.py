"""finite_scalar_quantize: every entry to one of a few levels of its column, and the index of the combination."""
