"""Where weights come from: what their run's folder says, for the card of an export."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from quarterview.config import MAY_CHANGE, PATH, field_specs
from quarterview.data import config as data
from quarterview.errors import UserError
from quarterview.methods import config as methods
from quarterview.models import config as models
from quarterview.training import checkpoint
from quarterview.training import config as training
from quarterview.training.metric_writers import read_metrics
from quarterview.weights.config import InitConfig, StartConfig, TuningConfig
from quarterview.weights.loading import SCHEMES, Weights, read

_SCRATCH = "scratch"
_PARTS = (
    *(models.ViTConfig, models.AutoencoderConfig),
    *(data.DataConfig, data.LoaderConfig, data.ViewConfig, data.AugmentConfig),
    *(methods.RegularizationConfig, *get_args(methods.MethodConfig)),
    *(training.RunConfig, training.ResumeConfig, training.LoopConfig, training.ComputeConfig),
    *(
        training.OptimConfig,
        training.LayerDecayConfig,
    ),
    *(InitConfig, StartConfig, TuningConfig),
)
"""The parts whose fields a card may show, but for places (PATH) and what says nothing of the weights,
because a resumed run may change it (MAY_CHANGE)."""
_LOSSES = ("loss", "val_loss")
_GENERATIONS = 8
"""How far back the weights' forebears are followed."""


@dataclass(frozen=True)
class Facts:
    """What is known of where weights come from. Everything may be unknown."""

    name: str = ""
    """What the run is called."""
    average: bool = False
    """Whether these are the moving average of the weights."""
    steps: int | None = None
    """Updates that they were trained for."""
    epochs: float | None = None
    """Passes over the images."""
    fingerprint: str = ""
    """Of the images that they were trained on."""
    images: int | None = None
    """How many those were."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration, as far as `shown_settings` shows it."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """The newest losses of the run, by name."""
    accuracies: Mapping[str, float] = field(default_factory=dict)
    """What probes and fine-tuning found, by name, with what stood beside the model."""
    licence: str = ""
    """Of these weights, or of those that they were trained from: an SPDX name, or a text."""
    started_from: str = ""
    """What the weights were at the beginning; empty for random ones."""
    start: "Facts | None" = None
    """What is known of those."""
    decoder: bool = True
    """Whether a masked autoencoder's decoder is among them."""

    @property
    def crop_pct(self) -> float | None:
        """Share of the central box that the run's test images were cut to; None for the default."""
        return self.settings.get("crop_pct")


def facts_of(
    path: str | Path, ema: bool = False, licence: str = "", allow_partial: Sequence[str] = ()
) -> Facts:
    """What the folder of a run says of its weights.

    The licence is the one that is given, or else the one that the run recorded, or else that of the
    weights that the run started from, and so on.

    Args:
        path: a run, a checkpoint folder, a weights file, or weights from elsewhere; what lies in no run
            says little.
        ema: of the moving average of the weights.
        licence: of the weights, where the caller knows it.
        allow_partial: as `quarterview.weights.loading.read`.

    Raises:
        UserError: if there are no weights at that path.
    """
    return _facts(path, read(path, ema, allow_partial), licence, _GENERATIONS)


def _facts(path: str | Path, weights: Weights, licence: str, generations: int) -> Facts:
    file = weights.file
    if not weights.ours or file is None or not (file.resolve().parent / "state.json").is_file():
        return Facts(name=_name(path), licence=licence or weights.licence)
    folder = file.resolve().parent
    state = checkpoint.read_state(folder)
    run = folder.parents[1]
    record = _read(run / "run.json")
    config, resolved = flat_settings(state.get("config", {})), state.get("resolved", {})
    started = config.get("init_from") or config.get("run") or ""  # of pre-training, or of fine-tuning
    started = "" if started == _SCRATCH else started
    start = _start(started, generations) if started else None
    recorded = resolved.get("licence") or state.get("licence") or record.get("licence") or ""
    losses, epochs = _losses(run, state.get("step"))
    return Facts(
        name=run.name,
        average=file.stem == "ema",
        steps=state.get("step"),
        epochs=epochs,
        fingerprint=resolved.get("fingerprint", ""),
        images=record.get("data", {}).get("images"),
        settings=shown_settings(config),
        losses=losses,
        accuracies=_accuracies(run, str(file.resolve().relative_to(run))),
        licence=licence or recorded or (start.licence if start else ""),
        started_from=started if started.startswith(SCHEMES) else Path(started).name,
        start=start,
    )


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run as its state holds it, by the names of its flags.

    Args:
        config: nested by parts, or flat as version 0.1 wrote it. Of a part that is one of several, such as
            the method, ``name`` says which one it is.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if not isinstance(value, Mapping):
            flat[name] = value
            continue
        own = dict(value)
        if "name" in own:
            flat[name] = own.pop("name")
        flat |= own
    return flat


def shown_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that a card may show: those that say how the weights were made.

    What is left out are places of this machine, what concerns its hardware and its logs, and what is unset.

    Args:
        config: as `flat_settings` returns it.
    """
    shown = {
        name
        for part in _PARTS
        for name, spec in field_specs(part).items()
        if not spec.markers & {PATH, MAY_CHANGE}
    } | {"method", "objective"}
    return {name: value for name, value in config.items() if name in shown and value is not None}


def _start(path: str, generations: int) -> Facts | None:
    """The facts of the weights that a run began with, if they still lie where they did."""
    if generations == 0 or not Path(path).exists():  # nothing is fetched for a card
        return None
    try:
        return _facts(path, read(path), "", generations - 1)
    except UserError:  # a run that was emptied
        return None


def _name(path: str | Path) -> str:
    """What weights that lie in no run are called: the file's name, or what follows timm: or hf:."""
    text = str(path)
    scheme, _, rest = text.partition(":")
    return rest if scheme in ("timm", "hf") else Path(text).stem


def _losses(run: Path, step: int | None) -> tuple[dict[str, float], float | None]:
    """The newest metrics of a run at a step, by name, and the epochs by then."""
    rows = [row for row in read_metrics(run) if step is None or row["step"] <= step]
    found = {name: row[name] for row in rows for name in _LOSSES if isinstance(row.get(name), int | float)}
    return found, rows[-1].get("epoch") if rows else None


def _accuracies(run: Path, weights: str) -> dict[str, float]:
    """What probes and fine-tuning found of these weights and of what stood beside them, by name."""
    found: dict[str, float] = {}
    for file in sorted((run / "results").glob("*.json")):
        content = _read(file)
        results, settings = content.get("results", {}), content.get("settings", {})
        if settings.get("weights", weights) != weights:
            continue
        if "accuracy" in results:
            found[f"{file.stem}: this model"] = results["accuracy"]
        rows = results.get("accuracies", [])
        if isinstance(rows, dict):
            found |= {f"{file.stem}: {name}": row["accuracy"] for name, row in rows.items()}
        else:
            found |= {f"{file.stem}, k {r['k']}, {r['vote']}: {r['features']}": r["accuracy"] for r in rows}
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
