"""Weights of others, read as ours."""
