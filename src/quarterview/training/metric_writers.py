"""Where the metrics of a run are written: ``metrics.jsonl``, which is the record, and views of it.

A new view, such as another tracker, is a class with the methods of `MetricWriter`. It is given the rows that
the record has when the run is opened, so that after a resume no step is in it twice, and it is listed in
`quarterview.training.logging.RunLogger.open`.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from quarterview.files import replace_text

METRICS = "metrics.jsonl"
Row = Mapping[str, Any]
"""The metrics of a step by name, ``step`` among them; numbers are finite, and None stands for others."""


class MetricWriter(Protocol):
    """Something that metrics are written to."""

    def write(self, row: Row) -> None:
        """Add the metrics of a step."""
        ...

    def close(self) -> None:
        """End writing; what was written is safe then."""
        ...


class JsonlWriter:
    """The record, ``metrics.jsonl`` in a run's folder: a line of JSON for each row.

    Args:
        folder: the run's.
        step: where the run goes on; rows beyond it are removed.

    Attributes:
        history: the rows up to that step.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.history = cut_rows(folder / METRICS, step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Add a row, which is in the file as soon as this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """A view for TensorBoard, ``tensorboard/`` in a run's folder, made again from the record each time.

    Args:
        folder: the run's.
        history: the rows of the record.
    """

    def __init__(self, folder: Path, history: Iterable[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(folder / "tensorboard")
        for row in history:
            self.write(row)

    def write(self, row: Row) -> None:
        """Add each number of a row to its curve."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is pending and close the file."""
        self._writer.close()


def cut_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the rows beyond a step from a file of JSON lines, and return those that stay."""
    if not path.exists():
        return []
    rows = [row for row in _read_rows(path) if row["step"] <= step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``; none if there is no such file."""
    path = folder / METRICS
    return _read_rows(path) if path.exists() else []


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have cut the last one
