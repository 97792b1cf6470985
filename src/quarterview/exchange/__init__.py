"""Weights in and out."""

from quarterview.exchange.facts import Facts, facts_of
from quarterview.exchange.hub import push
from quarterview.exchange.onnx import export_onnx
from quarterview.exchange.safetensors import export_safetensors
from quarterview.exchange.timm import export_timm
from quarterview.exchange.torch_export import export_torch_export
from quarterview.exchange.transformers import export_transformers
from quarterview.exchange.verify import Exported
from quarterview.exchange.weights import load, load_into

__all__ = [
    "Exported",
    "Facts",
    "export_onnx",
    "export_safetensors",
    "export_timm",
    "export_torch_export",
    "export_transformers",
    "facts_of",
    "load",
    "load_into",
    "push",
]
