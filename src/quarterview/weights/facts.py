"""Collect from a run's folder how its weights were trained, for the model card of an export."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from quarterview.config import MAY_CHANGE, PATH, get_field_specs, get_renamed_fields, use_new_names
from quarterview.data import config as data
from quarterview.errors import UserError
from quarterview.methods import config as methods
from quarterview.models import config as models
from quarterview.training import checkpoint
from quarterview.training import config as training
from quarterview.training.metric_writers import read_metrics
from quarterview.weights.config import SCRATCH, InitConfig, StartConfig, TuningConfig
from quarterview.weights.loading import REMOTE_PREFIXES, Weights, read_weights

_CARD_CONFIGS = (
    *(models.ViTConfig, models.AutoencoderConfig),
    *(data.DataConfig, data.LoaderConfig, data.ViewConfig, data.AugmentConfig),
    *(methods.RegularizationConfig, *get_args(methods.MethodConfig)),
    *(training.RunConfig, training.ResumeConfig, training.LoopConfig, training.ComputeConfig),
    *(training.OptimConfig, training.LayerDecayConfig),
    *(InitConfig, StartConfig, TuningConfig),
)
"""The configuration classes whose fields a model card may show. Excluded are paths (PATH), and fields that a
resumed run may change (MAY_CHANGE), because these say nothing about the weights."""
_LOSS_COLUMNS = ("loss", "val_loss")
_MAX_ANCESTORS = 8
"""Maximum length of the chain of runs, each started from the weights of the next."""


@dataclass(frozen=True)
class ModelInfo:
    """How weights were trained, for a model card. The default of each field means: not known."""

    name: str = ""
    """Name of the run."""
    is_ema: bool = False
    """True for the moving average of the run's weights."""
    steps: int | None = None
    """Number of optimizer updates."""
    epochs: float | None = None
    """Number of passes over the training images."""
    fingerprint: str = ""
    """Fingerprint of the training images."""
    num_images: int | None = None
    """Number of training images."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration, restricted by `select_card_settings`."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """The last losses of the run, by name."""
    accuracies: Mapping[str, float] = field(default_factory=dict)
    """Accuracies of probes and of fine-tuning, by name, including those of the baselines."""
    license: str = ""
    """License of these weights, or of the weights that they started from: an SPDX name or free text."""
    base_model: str = ""
    """Name of the weights that training started from; empty for random weights."""
    base_model_info: "ModelInfo | None" = None
    """How the base model was trained."""
    has_decoder: bool = True
    """False if a masked autoencoder's decoder is missing."""

    @property
    def crop_pct(self) -> float | None:
        """Center-crop fraction of the run's test images; None for the default."""
        return self.settings.get("crop_pct")


def read_model_info(
    source: str | Path, ema: bool = False, license: str = "", allow_partial: Sequence[str] = ()
) -> ModelInfo:
    """Read from a run's folder how its weights were trained.

    The license is the argument, else the one that the run recorded, else that of the weights that the run
    started from, and so on.

    Args:
        source: a run, a checkpoint folder, a weights file, or weights of another library. Little is known
            about weights outside a run.
        ema: describe the moving average of the weights.
        license: the license of the weights, if the caller knows it.
        allow_partial: as for `quarterview.weights.loading.read_weights`.

    Raises:
        UserError: if there are no weights at that path.
    """
    return _read_info(source, read_weights(source, ema, allow_partial), license, _MAX_ANCESTORS)


def _read_info(source: str | Path, weights: Weights, license: str, max_ancestors: int) -> ModelInfo:
    file = weights.file
    if not weights.is_native or file is None or not (file.resolve().parent / "state.json").is_file():
        return ModelInfo(name=_get_name(source), license=license or weights.license)
    folder = file.resolve().parent
    state = checkpoint.read_state(folder)
    run = folder.parents[1]
    record = _read_json(run / "run.json")
    config, resolved = flatten_settings(state.get("config", {})), state.get("resolved", {})
    base = config.get("init_from") or config.get("run") or ""  # the flag of pretrain, and of finetune
    base = "" if base == SCRATCH else base
    base_info = _read_base_model_info(base, max_ancestors) if base else None
    recorded = resolved.get("licence") or state.get("licence") or record.get("licence") or ""
    losses, epochs = _read_losses(run, state.get("step"))
    return ModelInfo(
        name=run.name,
        is_ema=file.stem == "ema",
        steps=state.get("step"),
        epochs=epochs,
        fingerprint=resolved.get("fingerprint", ""),
        num_images=record.get("data", {}).get("images"),
        settings=select_card_settings(config),
        losses=losses,
        accuracies=_read_accuracies(run, str(file.resolve().relative_to(run))),
        license=license or recorded or (base_info.license if base_info else ""),
        base_model=base if base.startswith(REMOTE_PREFIXES) else Path(base).name,
        base_model_info=base_info,
    )


def flatten_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in a run's state as one dict, from flag names to values.

    Args:
        config: nested by configuration class, or flat, as version 0.1 wrote it. Where a field is a union of
            classes, such as the method, ``name`` states the class.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if not isinstance(value, Mapping):
            flat[name] = value
            continue
        nested = dict(value)
        if "name" in nested:
            flat[name] = nested.pop("name")
        flat |= nested
    renamed = {old: new for part in _CARD_CONFIGS for old, new in get_renamed_fields(part).items()}
    return use_new_names(flat, renamed, warn=False)


def select_card_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that a model card may show: those that determine the weights.

    Paths, settings of hardware and logging, and unset fields are left out.

    Args:
        config: as `flatten_settings` returns it.
    """
    shown = {
        name
        for part in _CARD_CONFIGS
        for name, spec in get_field_specs(part).items()
        if not spec.markers & {PATH, MAY_CHANGE}
    } | {"method", "objective"}
    return {name: value for name, value in config.items() if name in shown and value is not None}


def _read_base_model_info(path: str, max_ancestors: int) -> ModelInfo | None:
    """Read how the weights that a run started from were trained; None if they are no longer at that path."""
    if max_ancestors == 0 or not Path(path).exists():  # nothing is downloaded for a model card
        return None
    try:
        return _read_info(path, read_weights(path), "", max_ancestors - 1)
    except UserError:  # for example, a run whose checkpoints were deleted
        return None


def _get_name(source: str | Path) -> str:
    """Return the name of weights outside a run: the file's stem, or the name after timm: or hf:."""
    text = str(source)
    scheme, _, rest = text.partition(":")
    return rest if scheme in ("timm", "hf") else Path(text).stem


def _read_losses(run_folder: Path, step: int | None) -> tuple[dict[str, float], float | None]:
    """Return the last losses of a run up to a step, by name, and the epochs by then."""
    rows = [row for row in read_metrics(run_folder) if step is None or row["step"] <= step]
    losses = {
        name: row[name] for row in rows for name in _LOSS_COLUMNS if isinstance(row.get(name), int | float)
    }
    return losses, rows[-1].get("epoch") if rows else None


def _read_accuracies(run_folder: Path, weights_path: str) -> dict[str, float]:
    """Return the accuracies in a run's results that belong to these weights, by name, with the baselines."""
    accuracies: dict[str, float] = {}
    for file in sorted((run_folder / "results").glob("*.json")):
        content = _read_json(file)
        results, settings = content.get("results", {}), content.get("settings", {})
        if settings.get("weights", weights_path) != weights_path:
            continue
        if "accuracy" in results:
            accuracies[f"{file.stem}: this model"] = results["accuracy"]
        rows = results.get("accuracies", [])
        if isinstance(rows, dict):
            accuracies |= {f"{file.stem}: {name}": row["accuracy"] for name, row in rows.items()}
        else:
            accuracies |= {
                f"{file.stem}, k {row['k']}, {row['vote']}: {row['features']}": row["accuracy"]
                for row in rows
            }
    return accuracies


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
