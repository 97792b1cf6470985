"""Export to one safetensors file with all weights, and the configuration in its header."""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path

from quarterview.models.classifier import Classifier
from quarterview.models.config import ViTConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.training.checkpoint import save_weights
from quarterview.weights.export.folder import staging_folder
from quarterview.weights.export.model_card import FormatInfo
from quarterview.weights.export.verify import (
    ExportResult,
    Model,
    check_tolerance,
    compare_outputs,
    compute_outputs,
    get_package_versions,
)
from quarterview.weights.facts import ModelInfo
from quarterview.weights.loading import get_decoder_keys, load, make_metadata

FILE_NAME = "model.safetensors"


def export_safetensors(model: Model, path: str | Path, info: ModelInfo | None = None) -> ExportResult:
    """Write a safetensors file that ``quarterview.load`` and all commands open.

    The weights of encoder and classifier have timm's names. The header contains the configuration as JSON,
    under ``quarterview``.

    Args:
        model: the model to export.
        path: the file to write; an existing one is replaced.
        info: how the model was trained; the license is written to the header.

    Raises:
        RunError: if the file cannot be written, or its outputs differ from those of `model`.
    """
    path = Path(path)
    with staging_folder(path.parent, path.name) as folder:
        differences = write_and_verify(model, folder / path.name, info or ModelInfo())
    return ExportResult(path, differences, get_package_versions("safetensors"))


def write_and_verify(model: Model, file: Path, info: ModelInfo) -> Mapping[str, float]:
    """Write the file, open it again, and return the largest difference of each output."""
    license = {"license": info.license} if info.license else {}
    weights, config = dict(model.state_dict()), model.config
    if isinstance(model, MaskedAutoencoder) and not info.has_decoder:
        config = ViTConfig(**{field.name: getattr(config, field.name) for field in fields(ViTConfig)})
        decoder_keys = get_decoder_keys(model.config)
        weights = {name: value for name, value in weights.items() if name not in decoder_keys}
    save_weights(file, weights, {**make_metadata(config), **license})
    differences = compare_outputs(model, partial(compute_outputs, load(file)))
    check_tolerance("safetensors", differences)
    return differences


def describe_format(model: Model) -> FormatInfo:
    """Return the model card's description of the format."""
    call, shape = ("tokens = model.encode(images)", f"{model.config.cls_tokens} + patches, width")
    if isinstance(model, Classifier):
        call, shape = ("logits = model(images)", "classes")
    return FormatInfo(
        name="safetensors",
        library="quarterview",
        load_code='import quarterview as qv\n\nmodel = qv.load("FOLDER/model.safetensors")\n'
        f"{call}  # float [B, {shape}]",
        packages=("safetensors",),
        notes=(
            "Without Quarterview: `safetensors.torch.load_file` reads the weights, under timm's names where "
            "timm has them. The header of the file contains the configuration as JSON.",
        ),
    )
