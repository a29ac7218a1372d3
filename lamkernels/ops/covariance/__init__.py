"""Weighted means and centred scatter matrices of rows, of pairs of rows, and of rows a lag apart."""
