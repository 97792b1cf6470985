"""Writers of a run's metrics: ``metrics.jsonl``, which is the record, and TensorBoard.

A new writer, such as another tracker, is a class with the methods of `MetricWriter`, added in
`quarterview.training.logging.RunLogger.open`. It takes the rows that the record has when a run is opened, so
that a resumed run has no step twice.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from quarterview.files import write_text_atomic

METRICS_FILE = "metrics.jsonl"
Row = Mapping[str, Any]
"""The metrics of a step by name, including ``step``. Numbers that are not finite are None."""


class MetricWriter(Protocol):
    """A destination of metrics."""

    def write(self, row: Row) -> None:
        """Write the metrics of a step."""
        ...

    def close(self) -> None:
        """Write pending metrics and close the destination."""
        ...


class JsonlWriter:
    """Writes ``metrics.jsonl`` in a run's folder, a line of JSON for each row.

    Args:
        folder: the run's folder.
        step: the step that the run starts or resumes from; later rows are removed.

    Attributes:
        history: the rows up to that step.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.history = truncate_rows(folder / METRICS_FILE, step)
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append a row and flush the file."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """Writes ``tensorboard/`` in a run's folder, recreated from the record each time a run is opened.

    Args:
        folder: the run's folder.
        history: the rows so far.
    """

    def __init__(self, folder: Path, history: Iterable[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(folder / "tensorboard")
        for row in history:
            self.write(row)

    def write(self, row: Row) -> None:
        """Add each number of a row as a scalar."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write pending scalars and close the file."""
        self._writer.close()


def truncate_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the rows after a step from a file of JSON lines, and return the remaining rows."""
    if not path.exists():
        return []
    rows = [row for row in _read_rows(path) if row["step"] <= step]
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``; empty if there is no such file."""
    path = folder / METRICS_FILE
    return _read_rows(path) if path.exists() else []


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [
        json.loads(line) for line in lines if line.endswith("\n")
    ]  # a killed process may have left half a line
