"""Weights in and out."""

from quarterview.exchange.transformers import export_transformers
from quarterview.exchange.weights import load, load_into

__all__ = ["export_transformers", "load", "load_into"]
