"""Transforms of images before they reach the model."""
