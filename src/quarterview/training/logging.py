"""What a run says and writes down: the only place that prints and logs.

``metrics.jsonl`` is the record; TensorBoard is a view of it, made again from it when a run is
resumed, so that no step is ever there twice.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from quarterview.errors import UserError


def escape(text: str) -> str:
    """A text as it may be printed: no markup, and what is no UTF-8, as of a path, written out."""
    return escape_markup(text.encode("utf-8", "backslashreplace").decode())


_PLAIN_SECONDS = 15  # between progress lines where there is no terminal


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


class Journal:
    """The voice and the memory of a run.

    Args:
        folder: the run's folder; None only speaks.
        quiet: say and write nothing: other ranks than the first.

    Raises:
        UserError: if the folder's name is no UTF-8, under which TensorBoard cannot write.
    """

    def __init__(self, folder: Path | None = None, quiet: bool = False) -> None:
        if folder is not None and escape(str(folder)) != escape_markup(str(folder)):
            raise UserError(
                f"the name of the run's folder {str(folder)!r} is no UTF-8; accepted: one that is"
            )
        self.folder, self.quiet = folder, quiet
        self.console = Console(quiet=quiet, highlight=False)
        self._progress: Progress | None = None
        self._task = None
        self._metrics = None
        self._tensorboard = None
        self._last_line = -math.inf

    # ------------------------------------------------------------------ speaking

    def say(self, text: str) -> None:
        """A line for the person who started this."""
        self.console.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that should not be overlooked."""
        self.console.print(f"[yellow]note:[/yellow] {escape(text)}", soft_wrap=True)

    def fail(self, text: str) -> None:
        """A line on standard error: why this ended."""
        Console(stderr=True, highlight=False, quiet=self.quiet).print(
            f"[red]error:[/red] {escape(text)}", soft_wrap=True
        )

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, the first column to the left and the rest to the right."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what is so of each, one a line."""
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        self.console.print(table)

    # ------------------------------------------------------------------ a run's record

    def open(self, at_step: int) -> None:
        """Start recording at a step: whatever was recorded beyond it is cut off."""
        if self.folder is None or self.quiet:
            return
        rows = self._cut(self.folder / "metrics.jsonl", at_step)
        self._cut(self.folder / "skipped_steps.jsonl", at_step)
        self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")

        from torch.utils.tensorboard import SummaryWriter  # slow to import

        shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
        self._tensorboard = SummaryWriter(self.folder / "tensorboard")
        for row in rows:
            self._to_tensorboard(row)

    def _cut(self, path: Path, step: int) -> list[dict]:
        if not path.exists():
            return []
        whole = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
        rows = [row for row in map(json.loads, whole) if row["step"] <= step]
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def row(self, row: Mapping[str, Any]) -> None:
        """Record the metrics of a step."""
        if self._metrics is not None:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
            self._metrics.write(json.dumps(finite) + "\n")
            self._metrics.flush()
            self._to_tensorboard(finite)
        self._show(row)

    def _to_tensorboard(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and self._tensorboard is not None:
                self._tensorboard.add_scalar(name, value, row["step"])

    def skipped(self, step: int, ids: list[int]) -> None:
        """Record a step whose gradient was not finite, and the samples that were in it."""
        self.warn(f"step {step} gave a gradient that is not finite; the weights were not changed by it")
        if self.folder is not None and not self.quiet:
            with (self.folder / "skipped_steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "ids": ids}) + "\n")

    # ------------------------------------------------------------------ progress

    def start_progress(self, steps: int, done: int) -> None:
        """Show a bar on a terminal, or a line now and then elsewhere."""
        self._steps = steps
        self._started = (time.monotonic(), done)
        if self.quiet or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=steps, completed=done, status="")

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def _show(self, row: Mapping[str, Any]) -> None:
        status = describe(row, self._remaining(row["step"]))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=row["step"], status=status)
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS or row["step"] == self._steps:
            self._last_line = time.monotonic()
            self.say(f"step {row['step']}/{self._steps}  {status}")

    def _remaining(self, step: int) -> float:
        began, done = self._started
        return (time.monotonic() - began) / max(1, step - done) * (self._steps - step)

    def close(self) -> None:
        """Take down the bar and close the files."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for file in (self._metrics, self._tensorboard):
            if file is not None:
                file.close()
        self._metrics = self._tensorboard = None


def describe(row: Mapping[str, Any], remaining: float) -> str:
    """A metrics row in one line for people."""
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


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def metrics(folder: Path) -> list[dict]:
    """The rows of a run's ``metrics.jsonl``."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    whole = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]
