"""lookup_free_quantize: the sign of every entry, the index of the signs, the losses of single rows, in one pass."""
