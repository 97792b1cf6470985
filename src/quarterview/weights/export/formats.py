"""Export weights in the format that the configuration names."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from quarterview.errors import UserError
from quarterview.models.config import MAEConfig
from quarterview.weights.config import ExportConfig
from quarterview.weights.export import onnx, safetensors, timm, torch_export, transformers
from quarterview.weights.export.folder import check_output_folder, write_folder
from quarterview.weights.export.verify import ExportResult, Model
from quarterview.weights.facts import ModelInfo, read_model_info
from quarterview.weights.loading import build_model, read_weights

LOGGER = logging.getLogger("quarterview")
_SINGLE_FILE_MODULES: dict[str, ModuleType] = {
    "onnx": onnx,
    "safetensors": safetensors,
    "torch-export": torch_export,
}
"""The modules of the formats that consist of one file, beside the model card."""


def export(config: ExportConfig) -> ExportResult:
    """Export the weights of a run, and compare the outputs of the export with those of the model.

    Missing normalisation statistics and a missing license are logged at level WARNING.

    Raises:
        UserError: if there are no such weights, the format does not support them, a package is not installed,
            or the folder contains other files.
        RunError: if an output differs by more than `verify.TOLERANCE`.
    """
    check_output_folder(Path(config.out))
    weights = read_weights(config.run, config.ema)
    info = read_model_info(config.run, config.ema, config.license)
    if isinstance(weights.config, MAEConfig) and not weights.has_decoder:
        config, info = _drop_decoder(config), replace(info, has_decoder=False)
    model = build_model(weights)
    result = _export(model, config, info)
    if model.config.mean is None or model.config.std is None:
        LOGGER.warning(
            "The weights record no mean and std. The export contains 0 and 1, which change nothing."
        )
    if info.base_model and not info.license:
        LOGGER.warning(
            "The weights started from %s, whose license is not recorded. State it with --license.",
            info.base_model,
        )
    return result


def _drop_decoder(config: ExportConfig) -> ExportConfig:
    """Return the configuration for an export of the encoder alone.

    Raises:
        UserError: if the configuration names a part that needs a decoder.
    """
    if "mae" in config.parts:
        raise UserError(f"{config.run} has no decoder, which the part mae needs. Give --parts vit.")
    return replace(config, parts=("vit",)) if config.to == "transformers" else config


def _export(model: Model, config: ExportConfig, info: ModelInfo) -> ExportResult:
    if config.to == "timm":
        return timm.export_timm(model, config.out, info)
    if config.to == "transformers":
        return transformers.export_transformers(model, config.out, info, config.parts or None)
    if config.to == "onnx":
        onnx.check_packages()
    module = _SINGLE_FILE_MODULES[config.to]

    def write(folder: Path) -> Mapping[str, float]:
        return module.write_and_verify(model, folder / module.FILE_NAME, info)

    return write_folder(model, config.out, info, module.describe_format(model), write)
