"""code_statistics: how many rows chose each code, and their sum."""
