"""Load weights of this package and of other libraries, and export them to other libraries."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quarterview.weights.export.onnx import export_onnx
    from quarterview.weights.export.safetensors import export_safetensors
    from quarterview.weights.export.timm import export_timm
    from quarterview.weights.export.torch_export import export_torch_export
    from quarterview.weights.export.transformers import export_transformers
    from quarterview.weights.export.verify import ExportResult
    from quarterview.weights.facts import ModelInfo, read_model_info
    from quarterview.weights.hub import push
    from quarterview.weights.loading import load, load_into

_MODULES = {
    "ExportResult": "export.verify",
    "ModelInfo": "facts",
    "export_onnx": "export.onnx",
    "export_safetensors": "export.safetensors",
    "export_timm": "export.timm",
    "export_torch_export": "export.torch_export",
    "export_transformers": "export.transformers",
    "load": "loading",
    "load_into": "loading",
    "push": "hub",
    "read_model_info": "facts",
}

__all__ = [
    "ExportResult",
    "ModelInfo",
    "export_onnx",
    "export_safetensors",
    "export_timm",
    "export_torch_export",
    "export_transformers",
    "load",
    "load_into",
    "push",
    "read_model_info",
]


def __getattr__(
    name: str,
) -> Any:  # lazy, so that importing `quarterview.weights.config` does not import torch
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
