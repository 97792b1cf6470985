"""One form for every result: ``results/NAME.json`` in the run's folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quarterview.files import replace_text
from quarterview.training.record import provenance
from quarterview.weights.loading import read


def results_folder(path: str | Path) -> Path | None:
    """Where the results of a run, a checkpoint or a file in one belong; None outside a run."""
    path = Path(path).resolve()
    for folder in (path, *path.parents[:3]):
        if (folder / "checkpoints").is_dir():
            return folder / "results"
    return None


def write_result(
    folder: Path | None,
    name: str,
    argv: Sequence[str],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Path | None:
    """Write ``folder/NAME.json`` whole or not at all.

    Args:
        folder: of `results_folder`; nothing is written if it is None.
        name: of the protocol and what tells this result from others of it, such as ``knn-10000``.
        argv: the command line.
        settings: how it was measured, seed included.
        data: fingerprints and sizes of the images.
        results: the figures.

    Returns:
        The file.
    """
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    content = {
        "protocol": name,
        "settings": dict(settings),
        "data": dict(data),
        "results": dict(results),
        **provenance(argv),
    }
    replace_text(file, json.dumps(content, indent=1) + "\n")
    return file


def record(
    run: str,
    ema: bool,
    name: str,
    argv: Sequence[str],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Path | None:
    """Write a result of a run's weights into the run's results folder; nothing for weights outside a run.

    Args:
        run, ema: the weights, as the user named them.
        name, argv, settings, data, results: as in `write_result`; the weights' file and digest are added to
            the settings.
    """
    folder, weights = results_folder(run), read(run, ema)
    if folder is None or weights.file is None:
        return None
    file = weights.file.resolve().relative_to(folder.parent)
    described = {"weights": str(file), "weights_digest": weights.digest}
    return write_result(folder, name, argv, {**described, **settings}, data, results)
