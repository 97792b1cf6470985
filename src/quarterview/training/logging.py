"""The logger of a run: what it shows people, and what it records."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quarterview.errors import UserError
from quarterview.training.console import Console, Progress, duration
from quarterview.training.metric_writers import (
    JsonlWriter,
    MetricWriter,
    TensorBoardWriter,
    cut_rows,
)

_SKIPPED = "skipped_steps.jsonl"


class Meter:
    """Images per second and the share of time spent waiting for data, since the last reading.

    Args:
        clock: seconds, from any start.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.images, self.waited, self.paused, self._started = 0, 0.0, 0.0, clock()

    def read(self) -> tuple[float, float]:
        """Images per second and waiting share in 0 … 1, not counting pauses; then start afresh."""
        elapsed = self.clock() - self._started - self.paused
        rate = self.images / elapsed if elapsed > 0 else 0.0
        share = min(1.0, self.waited / elapsed) if elapsed > 0 else 0.0
        self.images, self.waited, self.paused, self._started = 0, 0.0, 0.0, self.clock()
        return rate, share


class RunLogger:
    """Shows how a run goes, and records its metrics.

    Args:
        folder: the run's folder; None only shows.
        quiet: show and record nothing, as on other ranks than the first.

    Raises:
        UserError: if the folder's name is not UTF-8, under which TensorBoard cannot write.
    """

    def __init__(self, folder: Path | None = None, quiet: bool = False) -> None:
        if folder is not None and not _is_utf8(str(folder)):
            raise UserError(
                f"the name of the run's folder {str(folder)!r} is not UTF-8, under which TensorBoard cannot "
                "write. Give --out another name."
            )
        self.folder, self.quiet = folder, quiet
        self.console = Console(quiet)
        self._writers: list[MetricWriter] = []
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """Show a line."""
        self.console.say(text)

    def warn(self, text: str) -> None:
        """Show a line that should not be overlooked."""
        self.console.warn(text)

    # ------------------------------------------------------------------ metrics

    def open(self, at_step: int) -> None:
        """Start recording at a step: whatever was recorded beyond it is removed."""
        if self.folder is None or self.quiet:
            return
        cut_rows(self.folder / _SKIPPED, at_step)
        record = JsonlWriter(self.folder, at_step)
        self._writers = [record]
        self._writers.append(TensorBoardWriter(self.folder, record.history))

    def row(self, row: Mapping[str, Any]) -> None:
        """Record the metrics of a step, and show those that people follow."""
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
        for writer in self._writers:
            writer.write(finite)
        if self._progress is not None:
            status = describe(row, self._progress.remaining(row["step"]))
            self._progress.show(row["step"], status)

    def skipped(self, step: int, ids: list[int]) -> None:
        """Record a step whose gradient was not finite, and the ids of the samples that were in it."""
        self.warn(f"step {step} gave a gradient that is not finite; the weights were not changed by it")
        if self.folder is not None and not self.quiet:
            with (self.folder / _SKIPPED).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "ids": ids}) + "\n")

    # ------------------------------------------------------------------ progress

    def start_progress(self, steps: int, done: int) -> None:
        """Show a bar on a terminal, or a line now and then elsewhere."""
        self._progress = Progress(self.console, steps, done)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.advance(step)

    def close(self) -> None:
        """Take down the bar and close the files."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        for writer in self._writers:
            writer.close()
        self._writers = []


def describe(row: Mapping[str, Any], remaining: float) -> str:
    """A row of metrics in one line for people.

    Args:
        row: of a training step.
        remaining: seconds that the rest of the run will take.
    """
    parts = [f"loss {row['loss']:.4f}"]
    if row.get("val_loss") is not None:
        parts.append(f"val {row['val_loss']:.4f}")
    if row.get("knn_accuracy") is not None:
        parts.append(f"knn {row['knn_accuracy']:.1%}")
    parts.append(f"lr {row['lr']:.2e}")
    parts.append(f"{row['images_per_s']:.0f} images/s")
    parts.append(f"data {row['data_wait']:.0%}")
    parts.append(f"{duration(remaining)} left")
    return "  ".join(parts)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
