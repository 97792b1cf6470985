"""Export a model of ours in the format that was asked for."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from quarterview.errors import UserError
from quarterview.models.config import MAEConfig
from quarterview.weights.config import ExportConfig
from quarterview.weights.export import onnx, safetensors, timm, torch_export, transformers
from quarterview.weights.export.folder import check_folder, write_folder
from quarterview.weights.export.verify import Exported, Model
from quarterview.weights.facts import Facts, facts_of
from quarterview.weights.loading import open_model, read

LOGGER = logging.getLogger("quarterview")
_FILES: dict[str, ModuleType] = {
    "onnx": onnx,
    "safetensors": safetensors,
    "torch-export": torch_export,
}
"""The formats that are one file, which the export's folder holds beside the card."""


def export(config: ExportConfig) -> Exported:
    """Export the weights of a run and compare them with our forward.

    What the weights do not record, and should, is logged at WARNING.

    Raises:
        UserError: if there are no such weights, the target cannot hold them or is not installed, or
            the folder holds something else.
        RunError: if the target's forward differs from ours by more than `verify.LIMIT`.
    """
    check_folder(Path(config.out))
    weights = read(config.run, config.ema)
    facts = facts_of(config.run, config.ema, config.licence)
    if isinstance(weights.config, MAEConfig) and not weights.has_decoder:
        config, facts = _without_decoder(config), replace(facts, decoder=False)
    model = open_model(weights)
    done = _export(model, config, facts)
    if model.config.mean is None or model.config.std is None:
        LOGGER.warning("these weights record no mean and std, so 0 and 1 were written, which change nothing")
    if facts.started_from and not facts.licence:
        LOGGER.warning(
            "the weights started from %s, whose licence is not recorded; --licence says it",
            facts.started_from,
        )
    return done


def _without_decoder(config: ExportConfig) -> ExportConfig:
    """The export of an encoder alone.

    Raises:
        UserError: if it takes a decoder.
    """
    if "mae" in config.parts:
        raise UserError(f"{config.run} has no decoder, which the part mae needs. Give --parts vit.")
    return replace(config, parts=("vit",)) if config.to == "transformers" else config


def _export(model: Model, config: ExportConfig, facts: Facts) -> Exported:
    if config.to == "timm":
        return timm.export_timm(model, config.out, facts)
    if config.to == "transformers":
        return transformers.export_transformers(model, config.out, facts, config.parts or None)
    if config.to == "onnx":
        onnx.check_installed()
    form = _FILES[config.to]

    def write(folder: Path) -> Mapping[str, float]:
        return form.write(model, folder / form.FILE, facts)

    return write_folder(model, config.out, facts, form.target(model), write)
