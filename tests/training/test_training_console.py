"""Tests of the console, of log records and of metric writers."""

import io
import logging

import pytest
from rich.console import Console as RichConsole

from quarterview.training.console import LOGGER, Console, Progress, forward_logs
from quarterview.training.logging import RunLogger
from quarterview.training.metric_writers import JsonlWriter, read_metrics

ROW = {"loss": 0.5, "lr": 1e-3, "images_per_s": 10.0, "data_wait": 0.0}


def test_log_records_are_printed_while_a_command_runs(capsys):
    before = LOGGER.level
    with forward_logs():
        LOGGER.debug("nothing of this")
        LOGGER.info("%d images [of 5]", 4)
        LOGGER.warning("the mean is assumed")
        logging.getLogger("quarterview.data").info("from a child")
    LOGGER.info("not forwarded")
    assert capsys.readouterr().out.splitlines() == [
        "4 images [of 5]",
        "warning: the mean is assumed",
        "from a child",
    ]
    assert (LOGGER.level, LOGGER.handlers) == (before, [])


def test_other_ranks_than_the_first_are_quiet(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with forward_logs():
        LOGGER.warning("said by the first rank")
    assert capsys.readouterr().out == ""


def test_errors_go_to_standard_error_with_escaped_bytes(capsys):
    console = Console()
    console.info("photos/caf\udce9 [bold]")
    console.error("no such folder")
    out, err = capsys.readouterr()
    assert out == "photos/caf\\udce9 [bold]\n"
    assert err == "error: no such folder\n"
    Console(quiet=True).error("nothing")
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_progress_is_printed_in_lines(capsys):
    with Progress(Console(), total=30, done=10) as progress:
        for step in range(11, 31):
            progress.advance(step)
            progress.update(step, f"loss {step}")
    assert capsys.readouterr().out.splitlines() == ["step 11/30  loss 11", "step 30/30  loss 30"]
    assert progress.remaining(30) == 0


@pytest.fixture
def terminal(monkeypatch):
    """A text stream that claims to be a terminal."""
    text = io.StringIO()
    made = RichConsole(file=text, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr("quarterview.training.console.RichConsole", lambda **_: made)
    return text


def test_on_a_terminal_messages_are_printed_above_the_progress_bar(terminal):
    console, other = Console(), Console()
    with Progress(console, unit="shard") as progress:
        assert other.rich is console.rich
        progress(3, 7)
        other.info("a line")
        assert progress.total == 7
    assert "3/7" in terminal.getvalue()
    assert "a line" in terminal.getvalue()
    assert Console._active is None


def test_writers_get_finite_rows_and_the_history(tmp_path):
    log = RunLogger(tmp_path)
    log.open(0)
    for step in (1, 2, 3):
        log.log_metrics({"step": step, **ROW})
    log.log_metrics({"step": 4, **ROW, "loss": float("nan")})
    log.close()
    assert read_metrics(tmp_path)[-1] == {"step": 4, **ROW, "loss": None}
    record = JsonlWriter(tmp_path, 2)
    record.close()
    assert [row["step"] for row in record.history] == [1, 2]
    assert read_metrics(tmp_path) == record.history
    assert read_metrics(tmp_path / "elsewhere") == []
