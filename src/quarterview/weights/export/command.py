"""`quarterview export`: a model of ours, as others open it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

from quarterview.errors import UserError, check_types
from quarterview.models.config import MAEConfig
from quarterview.training.logging import Journal
from quarterview.weights.export import onnx, safetensors, timm, torch_export, transformers
from quarterview.weights.export.folder import check_folder, write_folder
from quarterview.weights.export.transformers import Part
from quarterview.weights.export.verify import Exported, Model
from quarterview.weights.facts import Facts, facts_of
from quarterview.weights.loading import open_model, read

To = Literal["timm", "transformers", "onnx", "safetensors", "torch-export"]

_FILES: dict[str, ModuleType] = {
    "onnx": onnx,
    "safetensors": safetensors,
    "torch-export": torch_export,
}
"""The formats that are one file, which the export's folder holds beside the card."""


@dataclass(frozen=True)
class ExportConfig:
    """What is exported, for what, and where to."""

    run: str
    """A run, a checkpoint folder, a .safetensors file, or weights from elsewhere."""
    to: To
    """What it is for: timm, transformers, onnx, safetensors, or torch-export."""
    out: str
    """The folder to write: new, empty, or an older export, which is replaced."""
    ema: bool = False
    """Take the moving average of the weights."""
    licence: str = ""
    """Of these weights, such as CC-BY-NC-4.0; by default what the run, or the weights it started from,
    recorded."""
    parts: tuple[Part, ...] = ()
    """Of transformers: which of mae, vit and classifier; by default mae and vit, or classifier and vit."""

    def __post_init__(self) -> None:
        check_types(self, ExportConfig)
        if self.parts and self.to != "transformers":
            raise UserError(f"--parts with --to {self.to}; accepted: with --to transformers")


def export(config: ExportConfig, journal: Journal) -> Exported:
    """Export the weights of a run, compare them with our forward, and say how near they are.

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
    for name, value in done.differences.items():
        journal.say(f"{name}: differs from our forward by at most {value:.1e} of the largest number")
    used = ", ".join(f"{name} {number}" for name, number in done.versions.items())
    journal.say(f"wrote {done.path} for {config.to} ({used}); see {done.path / 'README.md'}")
    if model.config.mean is None or model.config.std is None:
        journal.warn("these weights record no mean and std, so 0 and 1 were written, which change nothing")
    if facts.started_from and not facts.licence:
        journal.warn(
            f"the weights started from {facts.started_from}, whose licence is not recorded; --licence says it"
        )
    return done


def _without_decoder(config: ExportConfig) -> ExportConfig:
    """The export of an encoder alone.

    Raises:
        UserError: if it takes a decoder.
    """
    if "mae" in config.parts:
        raise UserError(f"{config.run} has no decoder, which the part mae is for; accepted: --parts vit")
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
