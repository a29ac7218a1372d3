"""vector_quantize: lookup, quantised output, losses and code statistics in one pass, and its backward."""
