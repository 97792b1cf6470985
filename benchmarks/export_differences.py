"""Numerical differences between exported models and the original: a row per model, a column per format.

    uv run python benchmarks/export_differences.py

Most models have one or two blocks, since errors of an export depend on width, patch size and grid. Weights
are random, and norms and biases far from their initial values. The output is a Markdown table.
"""

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from quarterview.errors import UserError
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.create import create_model
from quarterview.weights import (
    ExportResult,
    export_onnx,
    export_safetensors,
    export_timm,
    export_torch_export,
    export_transformers,
)
from quarterview.weights.export.verify import Model

SIZES = {
    "tiny/4 at 32, whole": ("mae_vit_tiny_patch4", 32, 3),
    "base width/16 at 224": ("mae_vit_768x2x12_patch16", 224, 3),
    "huge width/14 at 224": ("mae_vit_1280x1x16_patch14", 224, 3),
    "96 × 160": ("mae_vit_192x2x3_patch16", (96, 160), 3),
    "five channels": ("mae_vit_192x2x3_patch4", 32, 5),
}
EXPORT_FUNCTIONS = {
    "timm": export_timm,
    "transformers": export_transformers,
    "onnx": lambda model, folder: export_onnx(model, folder / "model.onnx"),
    "torch-export": lambda model, folder: export_torch_export(model, folder / "model.pt2"),
    "safetensors": lambda model, folder: export_safetensors(model, folder / "model.safetensors"),
}
PACKAGES = ("torch", "timm", "transformers", "onnx", "onnxruntime", "onnxscript", "safetensors")


def create_models() -> dict[str, Model]:
    """Create the models of the rows: an autoencoder of each size, and a classifier with each pooling."""
    models: dict[str, Model] = {
        name: create_model(model, image_size=size, in_chans=channels, decoder_depth=2)
        for name, (model, size, channels) in SIZES.items()
    }
    for pool in ("cls", "mean"):
        config = ClassifierConfig("mae_vit_192x2x3_patch4", (32, 32), classes=10, pool=pool)
        models[f"classifier, {pool}"] = Classifier(config)
    with torch.no_grad():
        for model in models.values():
            for parameter in model.parameters():
                if parameter.requires_grad and (parameter.ndim != 2 or len(parameter) == 10):
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return models


def measure_difference(model: Model, export_format: str) -> str:
    """Return the largest difference of the outputs as text, or ``no`` if the format cannot hold the model."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            result: ExportResult = EXPORT_FUNCTIONS[export_format](model, Path(folder))
        except UserError:
            if export_format != "transformers" or isinstance(model, Classifier):
                return "no"
            return f"{export_transformers(model, folder, parts=['vit']).max_difference:.1e} (vit)"
    return f"{result.max_difference:.1e}"


def main() -> None:
    """Export all models and print the table."""
    torch.manual_seed(0)
    print("| | " + " | ".join(EXPORT_FUNCTIONS) + " |")
    print("|---|" + "---|" * len(EXPORT_FUNCTIONS))
    for name, model in create_models().items():
        print(
            f"| {name} | "
            + " | ".join(measure_difference(model, target) for target in EXPORT_FUNCTIONS)
            + " |",
            flush=True,
        )
    print("\n" + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + f", {platform.machine()}")


if __name__ == "__main__":
    main()
