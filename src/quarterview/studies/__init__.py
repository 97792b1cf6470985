"""Families of runs: the paper's ablations and comparisons, and anyone's own, on one budget."""
