"""Checks of whether a pre-training run works."""
