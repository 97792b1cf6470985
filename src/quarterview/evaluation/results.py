"""One form for every result: ``results/NAME.json`` in the run's folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quarterview.training.logging import replace_text
from quarterview.training.record import provenance


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
