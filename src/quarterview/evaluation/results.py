"""Result files of evaluations: ``results/NAME.json`` in the folder of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quarterview.files import write_text_atomic
from quarterview.training.record import collect_provenance
from quarterview.weights.loading import read_weights


def find_results_folder(path: str | Path) -> Path | None:
    """Return the results folder for a run, a checkpoint or a file inside a run; None outside a run."""
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
    """Write ``folder/NAME.json`` atomically.

    Args:
        folder: result of `find_results_folder`; nothing is written if it is None.
        name: name of the protocol and its variant, such as ``knn-10000``.
        argv: the command line.
        settings: settings of the evaluation, with the seed.
        data: fingerprints and sizes of the images.
        results: metrics.

    Returns:
        The path of the file.
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
        **collect_provenance(argv),
    }
    write_text_atomic(file, json.dumps(content, indent=1) + "\n")
    return file


def record_result(
    run: str,
    ema: bool,
    name: str,
    argv: Sequence[str],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Path | None:
    """Write a result into the results folder of a run; nothing is written for weights outside a run.

    Args:
        run, ema: the weights, as given by the user.
        name, argv, settings, data, results: see `write_result`; the file and the digest of the weights are
            added to the settings.
    """
    folder, weights = find_results_folder(run), read_weights(run, ema)
    if folder is None or weights.file is None:
        return None
    file = weights.file.resolve().relative_to(folder.parent)
    described = {"weights": str(file), "weights_digest": weights.digest}
    return write_result(folder, name, argv, {**described, **settings}, data, results)
