"""How far exports are from our forward: a row a size, a column a target.

    uv run python benchmarks/export_differences.py

Sizes have one or two blocks, since width, patches and grid are what an export can get wrong; weights
are random, norms and biases far from their initial ones. Prints Markdown.
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
    Exported,
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
TARGETS = {
    "timm": export_timm,
    "transformers": export_transformers,
    "onnx": lambda model, folder: export_onnx(model, folder / "model.onnx"),
    "torch-export": lambda model, folder: export_torch_export(model, folder / "model.pt2"),
    "safetensors": lambda model, folder: export_safetensors(model, folder / "model.safetensors"),
}
PACKAGES = ("torch", "timm", "transformers", "onnx", "onnxruntime", "onnxscript", "safetensors")


def models() -> dict[str, Model]:
    """The rows: an encoder of each size, and a classifier of each pooling."""
    found: dict[str, Model] = {
        name: create_model(model, image_size=size, in_chans=channels, decoder_depth=2)
        for name, (model, size, channels) in SIZES.items()
    }
    for pool in ("cls", "mean"):
        config = ClassifierConfig("mae_vit_192x2x3_patch4", (32, 32), classes=10, pool=pool)
        found[f"classifier, {pool}"] = Classifier(config)
    with torch.no_grad():
        for model in found.values():
            for parameter in model.parameters():
                if parameter.requires_grad and (parameter.ndim != 2 or len(parameter) == 10):
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return found


def cell(model: Model, target: str) -> str:
    """The largest difference, or that there is no such export."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done: Exported = TARGETS[target](model, Path(folder))
        except UserError:
            if target != "transformers" or isinstance(model, Classifier):
                return "no"
            return f"{export_transformers(model, folder, parts=['vit']).largest:.1e} (vit)"
    return f"{done.largest:.1e}"


def main() -> None:
    torch.manual_seed(0)
    print("| | " + " | ".join(TARGETS) + " |")
    print("|---|" + "---|" * len(TARGETS))
    for name, model in models().items():
        print(f"| {name} | " + " | ".join(cell(model, target) for target in TARGETS) + " |", flush=True)
    print("\n" + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + f", {platform.machine()}")


if __name__ == "__main__":
    main()
