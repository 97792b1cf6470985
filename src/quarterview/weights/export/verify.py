"""Verify that an exported model, run by its target library, computes the same as the original model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from quarterview import rng
from quarterview.errors import RunError
from quarterview.models.classifier import Classifier
from quarterview.models.config import ViTConfig
from quarterview.models.mae import MaskedAutoencoder

Model = MaskedAutoencoder | Classifier

TOLERANCE = 1e-4
"""Largest accepted `compute_relative_difference` between an export and the original model, in float32."""
BATCH_SIZES = (1, 3)
"""Batch sizes that an export is verified with; several, because the batch size must be dynamic."""


@dataclass(frozen=True)
class ExportResult:
    """The path of an export, and its differences from the original model."""

    path: Path
    """The folder or file that was written."""
    differences: Mapping[str, float]
    """`compute_relative_difference` of each output, by name, on random images in float32."""
    versions: Mapping[str, str]
    """Versions of the packages that the export was verified with, by name."""

    @property
    def max_difference(self) -> float:
        """The largest difference of all outputs."""
        return max(self.differences.values())


def get_package_versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of torch and of the given packages, by name."""
    return {name: version(name) for name in ("torch", *packages)}


def make_reference_model(model: Model) -> Model:
    """Return a copy of a model in float32, on the CPU, in evaluation mode."""
    with torch.device("meta"):  # no random initialisation, no memory
        copy = (
            MaskedAutoencoder(model.config)
            if isinstance(model, MaskedAutoencoder)
            else Classifier(model.config)
        )
    weights = {name: value.detach().cpu().float() for name, value in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def make_random_images(config: ViTConfig, batch_size: int) -> Tensor:
    """Return standard normal images, the same in every call: float32 [batch_size, C, H, W]."""
    with rng.seeded(0, "verify an export", batch_size):
        return torch.randn(batch_size, config.in_chans, *config.image_size)


@torch.no_grad()
def compute_outputs(model: Model, images: Tensor) -> dict[str, Tensor]:
    """Compute with a model of this package the outputs that exports have.

    Returns:
        `tokens`, float [B, K + L, D]; for a masked autoencoder also `pooled`, the mean of the patch tokens,
        float [B, D]; for a classifier also `logits`, float [B, classes].
    """
    tokens = model.encode(images)
    if isinstance(model, Classifier):
        return {"tokens": tokens, "logits": model(images)}
    return {"tokens": tokens, "pooled": tokens[:, model.config.cls_tokens :].mean(dim=1)}


def compute_relative_difference(expected: Tensor, actual: Tensor) -> float:
    """Return the largest absolute difference, divided by the largest absolute expected value.

    The difference is relative because the scale of logits and of tokens without a norm is arbitrary. It is
    infinite if the shapes differ or a value is not finite.
    """
    if expected.shape != actual.shape:
        return math.inf
    largest = float((expected.double() - actual.double()).abs().max())
    relative = largest / (float(expected.double().abs().max()) or 1.0)
    return relative if math.isfinite(relative) else math.inf


@torch.no_grad()
def compare_outputs(model: Model, run_exported: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the largest relative difference of each output between an export and its model.

    Args:
        model: the original model.
        run_exported: runs the export: float [B, C, H, W] -> some of the outputs of `compute_outputs`, by
            name.
    """
    reference, differences = make_reference_model(model), dict[str, float]()
    for batch_size in BATCH_SIZES:
        images = make_random_images(model.config, batch_size)
        expected = compute_outputs(reference, images)
        for name, value in run_exported(images).items():
            difference = compute_relative_difference(expected[name], value)
            differences[name] = max(differences.get(name, 0.0), difference)
    return differences


def check_tolerance(format_name: str, differences: Mapping[str, float]) -> None:
    """Check that no output of an export differs by more than `TOLERANCE`.

    Raises:
        RunError: otherwise, naming the outputs.
    """
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        outputs = ", ".join(f"{name} by {value:.1e}" for name, value in wrong.items())
        raise RunError(
            f"The outputs of the export to {format_name} differ from those of the model: {outputs}, relative "
            f"to the largest value, and at most {TOLERANCE:.0e} is accepted. Nothing was written. Try "
            f"another version of {format_name}."
        )
