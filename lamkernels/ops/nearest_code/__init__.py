"""nearest_code: the index of the nearest code of each row."""
