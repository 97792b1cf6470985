"""Weights in and out."""

from quarterview.weights.export.onnx import export_onnx
from quarterview.weights.export.safetensors import export_safetensors
from quarterview.weights.export.timm import export_timm
from quarterview.weights.export.torch_export import export_torch_export
from quarterview.weights.export.transformers import export_transformers
from quarterview.weights.export.verify import Exported
from quarterview.weights.facts import Facts, facts_of
from quarterview.weights.hub import push
from quarterview.weights.loading import load, load_into

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
