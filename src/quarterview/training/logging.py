"""The logger of a run, which prints messages and records metrics."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quarterview.errors import UserError
from quarterview.training.console import Console, Progress, format_duration
from quarterview.training.metric_writers import (
    JsonlWriter,
    MetricWriter,
    TensorBoardWriter,
    truncate_rows,
)

_SKIPPED_FILE = "skipped_steps.jsonl"


class ThroughputMeter:
    """Measures images per second and the fraction of time spent waiting for data.

    Args:
        clock: returns seconds since an arbitrary time.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.num_images, self.wait_seconds, self.pause_seconds, self._started = 0, 0.0, 0.0, clock()

    def read_and_reset(self) -> tuple[float, float]:
        """Return images per second and the waiting fraction in [0, 1], without pauses, and reset both."""
        elapsed = self.clock() - self._started - self.pause_seconds
        rate = self.num_images / elapsed if elapsed > 0 else 0.0
        waiting = min(1.0, self.wait_seconds / elapsed) if elapsed > 0 else 0.0
        self.num_images, self.wait_seconds, self.pause_seconds, self._started = 0, 0.0, 0.0, self.clock()
        return rate, waiting


class RunLogger:
    """Prints messages and progress of a run, and records its metrics.

    Args:
        folder: the run's folder; None to record nothing.
        quiet: print and record nothing, as on all ranks but the first.

    Raises:
        UserError: if the folder's name is not UTF-8, which TensorBoard needs.
    """

    def __init__(self, folder: Path | None = None, quiet: bool = False) -> None:
        if folder is not None and not _is_utf8(str(folder)):
            raise UserError(
                f"The name of the run's folder {str(folder)!r} is not UTF-8, which TensorBoard needs. Give "
                "--out another name."
            )
        self.folder, self.quiet = folder, quiet
        self.console = Console(quiet)
        self._writers: list[MetricWriter] = []
        self._progress: Progress | None = None

    def info(self, text: str) -> None:
        """Print a message."""
        self.console.info(text)

    def warning(self, text: str) -> None:
        """Print a message as a warning."""
        self.console.warning(text)

    # ------------------------------------------------------------------ metrics

    def open(self, step: int) -> None:
        """Start recording at a step, and remove what was recorded after it."""
        if self.folder is None or self.quiet:
            return
        truncate_rows(self.folder / _SKIPPED_FILE, step)
        record = JsonlWriter(self.folder, step)
        self._writers = [record]
        self._writers.append(TensorBoardWriter(self.folder, record.history))

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Record the metrics of a step, and print the most important ones."""
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
        for writer in self._writers:
            writer.write(finite)
        if self._progress is not None:
            status = format_metrics(row, self._progress.remaining(row["step"]))
            self._progress.update(row["step"], status)

    def log_skipped_step(self, step: int, ids: list[int]) -> None:
        """Record a skipped step, whose gradient was not finite, and the ids of its samples."""
        self.warning(f"The gradient of step {step} is not finite. The step was skipped.")
        if self.folder is not None and not self.quiet:
            with (self.folder / _SKIPPED_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "ids": ids}) + "\n")

    # ------------------------------------------------------------------ progress

    def start_progress(self, steps: int, done: int) -> None:
        """Show a `Progress` of the run's steps."""
        self._progress = Progress(self.console, steps, done)

    def advance(self, step: int) -> None:
        """Set the number of completed steps."""
        if self._progress is not None:
            self._progress.advance(step)

    def close(self) -> None:
        """Remove the progress bar and close the files."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        for writer in self._writers:
            writer.close()
        self._writers = []


def format_metrics(row: Mapping[str, Any], remaining: float) -> str:
    """Format the most important metrics in one line.

    Args:
        row: the metrics of a training step.
        remaining: estimated seconds until the end of the run.
    """
    parts = [f"loss {row['loss']:.4f}"]
    if row.get("val_loss") is not None:
        parts.append(f"val {row['val_loss']:.4f}")
    if row.get("knn_accuracy") is not None:
        parts.append(f"knn {row['knn_accuracy']:.1%}")
    parts.append(f"lr {row['lr']:.2e}")
    parts.append(f"{row['images_per_s']:.0f} images/s")
    parts.append(f"data {row['data_wait']:.0%}")
    parts.append(f"{format_duration(remaining)} left")
    return "  ".join(parts)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
