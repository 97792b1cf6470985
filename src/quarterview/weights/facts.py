"""Where weights come from: what their run's folder says, for the card of an export."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quarterview.errors import UserError
from quarterview.training import checkpoint
from quarterview.training.logging import metrics
from quarterview.weights.loading import Weights, read

_STARTS = ("init_from", "run")  # what a run's configuration calls the weights that it began with
_SCRATCH = "scratch"
_PLACES = (  # where things lay and ran, which says nothing of the weights
    *("out", "data", "train", "test", "probe_train", "probe_test", "resume", "device", "cache", "workers"),
    *("init_from", "run", "tokenizer", "log_every", "eval_every", "checkpoint_every", "checkpoint_minutes"),
    *("keep_checkpoints", "probe_every"),
)
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
    """The run's configuration, without the places of files and what was left unset."""
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
    config, resolved = state.get("config", {}), state.get("resolved", {})
    started = next((config[name] for name in _STARTS if config.get(name) not in (None, "", _SCRATCH)), "")
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
        settings={k: value for k, value in config.items() if k not in _PLACES and value is not None},
        losses=losses,
        accuracies=_accuracies(run, str(file.resolve().relative_to(run))),
        licence=licence or recorded or (start.licence if start else ""),
        started_from=Path(started).name if Path(started).exists() else started,
        start=start,
    )


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
    rows = [row for row in metrics(run) if step is None or row["step"] <= step]
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
