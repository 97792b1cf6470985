"""What people see on their terminal: lines, tables, and how far something is.

Nothing else prints. Library code logs to the logger ``quarterview``, whose records `forward_logs` shows
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
    """A text that rich prints as it is: markup escaped, and bytes of paths that are not UTF-8 written out."""
    return escape_markup(text.encode("utf-8", "backslashreplace").decode())


class Console:
    """Lines, tables and facts for the person who started a command.

    Args:
        quiet: show nothing, as on other ranks than the first.
    """

    _with_bar: ClassVar[RichConsole | None] = None
    """The one that shows a progress bar now: all lines go through it, or they would be drawn into the bar."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._own = RichConsole(quiet=quiet, highlight=False)

    @property
    def rich(self) -> RichConsole:
        """What prints."""
        return self._own if self.quiet else Console._with_bar or self._own

    def say(self, text: str) -> None:
        """Show a line."""
        self.rich.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Show a line that should not be overlooked."""
        self.rich.print(f"[yellow]note:[/yellow] {escape(text)}", soft_wrap=True)

    def error(self, text: str) -> None:
        """Show on standard error why a command ended."""
        RichConsole(stderr=True, highlight=False, quiet=self.quiet).print(
            f"[red]error:[/red] {escape(text)}", soft_wrap=True
        )

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table, the first column aligned to the left and the others to the right."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        self.rich.print(table)

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show names and their values, one pair a line."""
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        self.rich.print(table)


class Progress:
    """How far something is: a bar on a terminal, and elsewhere a line with the status now and then.

    Args:
        console: where it is shown.
        total: how many there are to do; 0 if that will be known later.
        done: how many were done before.
        unit: what is counted.
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
        Console._with_bar = self._bar.console

    def __call__(self, done: int, total: int) -> None:
        """Move the bar to where so many of all are done, as library code reports it."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def advance(self, done: int) -> None:
        """Move the bar to where so many are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def show(self, done: int, status: str) -> None:
        """Move the bar and set the text beside it, or say it in a line if the last one was long ago."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS or done == self.total:
            self._last_line = time.monotonic()
            self.console.say(f"{self.unit} {done}/{self.total}  {status}")

    def remaining(self, done: int) -> float:
        """Seconds that the rest will take at the pace so far."""
        elapsed = time.monotonic() - self._began
        return elapsed / max(1, done - self._done_before) * (self.total - done)

    def close(self) -> None:
        """Take down the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = Console._with_bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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


# ---------------------------------------------------------------------- what library code logs


class _Handler(logging.Handler):
    """Shows records on a console: INFO as a line, and what is above it as a note."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        show = self.console.warn if record.levelno >= logging.WARNING else self.console.say
        show(record.getMessage())


@contextmanager
def forward_logs(console: Console | None = None) -> Iterator[None]:
    """Within this, what the package logs at INFO or above is shown on a console.

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
