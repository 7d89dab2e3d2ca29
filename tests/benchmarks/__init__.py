"""Measurements against the naive way, both sides in one run; `make bench` prints the ratios."""
