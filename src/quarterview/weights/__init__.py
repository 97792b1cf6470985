"""Weights in and out: open those of others, convert them, export ours."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quarterview.weights.export.onnx import export_onnx
    from quarterview.weights.export.safetensors import export_safetensors
    from quarterview.weights.export.timm import export_timm
    from quarterview.weights.export.torch_export import export_torch_export
    from quarterview.weights.export.transformers import export_transformers
    from quarterview.weights.export.verify import Exported
    from quarterview.weights.facts import Facts, facts_of
    from quarterview.weights.hub import push
    from quarterview.weights.loading import load, load_into

_HOMES = {
    "Exported": "export.verify",
    "Facts": "facts",
    "export_onnx": "export.onnx",
    "export_safetensors": "export.safetensors",
    "export_timm": "export.timm",
    "export_torch_export": "export.torch_export",
    "export_transformers": "export.transformers",
    "facts_of": "facts",
    "load": "loading",
    "load_into": "loading",
    "push": "hub",
}

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


def __getattr__(name: str) -> Any:  # so that `quarterview.weights.config` loads no torch
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
