"""Terminal output: messages, tables and progress bars.

No other module prints. Library code logs to the logger ``quarterview``, whose records `forward_logs` shows
while a command runs.
"""

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar, Self

from rich import progress
from rich.console import Console as RichConsole
from rich.markup import escape as escape_markup
from rich.table import Table

LOGGER = logging.getLogger("quarterview")
_PLAIN_SECONDS = 15  # between progress lines where there is no terminal


def escape(text: str) -> str:
    """Escape rich markup in a text, and bytes of paths that are not UTF-8."""
    return escape_markup(text.encode("utf-8", "backslashreplace").decode())


class Console:
    """Prints messages and tables of a command.

    Args:
        quiet: print nothing, as on all ranks but the first.
    """

    _active: ClassVar[RichConsole | None] = None
    """The console with a progress bar at present. All messages go through it, so as not to break the bar."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._own = RichConsole(quiet=quiet, highlight=False)

    @property
    def rich(self) -> RichConsole:
        """The rich console that prints."""
        return self._own if self.quiet else Console._active or self._own

    def info(self, text: str) -> None:
        """Print a message."""
        self.rich.print(escape(text), soft_wrap=True)

    def warning(self, text: str) -> None:
        """Print a message as a warning."""
        self.rich.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)

    def error(self, text: str) -> None:
        """Print an error to standard error."""
        RichConsole(stderr=True, highlight=False, quiet=self.quiet).print(
            f"[red]error:[/red] {escape(text)}", soft_wrap=True
        )

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table, the first column left-aligned and the others right-aligned."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        self.rich.print(table)

    def key_values(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and values, one pair a line."""
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        self.rich.print(table)


class Progress:
    """A progress bar on a terminal, and a line with the status every 15 seconds elsewhere.

    Args:
        console: prints it.
        total: total number of units; 0 if not known yet.
        done: number of units completed before.
        unit: name of the unit.
    """

    def __init__(self, console: Console, total: int = 0, done: int = 0, unit: str = "step") -> None:
        self.console, self.total, self.unit = console, total, unit
        self._began, self._done_before = time.monotonic(), done
        self._last_line = -math.inf
        self._bar: progress.Progress | None = None
        if console.quiet or not console.rich.is_terminal:
            return
        self._bar = progress.Progress(
            progress.TextColumn(unit),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=None),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[status]}"),
            console=console.rich,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total or None, completed=done, status="")
        Console._active = self._bar.console

    def __call__(self, done: int, total: int) -> None:
        """Set the number of completed units and their total, as a callback of library code."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def advance(self, done: int) -> None:
        """Set the number of completed units."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def update(self, done: int, status: str) -> None:
        """Set the number of completed units and the status. Without a bar, print both every 15 seconds."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS or done == self.total:
            self._last_line = time.monotonic()
            self.console.info(f"{self.unit} {done}/{self.total}  {status}")

    def remaining(self, done: int) -> float:
        """Return the estimated seconds until all units are completed."""
        elapsed = time.monotonic() - self._began
        return elapsed / max(1, done - self._done_before) * (self.total - done)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = Console._active = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def format_duration(seconds: float) -> str:
    """Format seconds for people: 45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


# ---------------------------------------------------------------------- log records


class _Handler(logging.Handler):
    """Prints log records on a console, those of WARNING and above as warnings."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        log = self.console.warning if record.levelno >= logging.WARNING else self.console.info
        log(record.getMessage())


@contextmanager
def forward_logs(console: Console | None = None) -> Iterator[None]:
    """Print what the package logs at INFO or above while in this context.

    Args:
        console: by default one that is quiet on all ranks of torchrun but the first.
    """
    handler = _Handler(console or Console(quiet=os.environ.get("RANK", "0") != "0"))
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
