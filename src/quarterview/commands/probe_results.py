"""How the commands knn and linear show what they find, and write it down."""

from collections.abc import Mapping, Sequence
from typing import Any

from quarterview.commands.config import KnnConfig, LinearConfig
from quarterview.config import field_specs
from quarterview.evaluation import results
from quarterview.evaluation.config import ProbeConfig
from quarterview.evaluation.probe import Probe
from quarterview.evaluation.statistics import standard_error
from quarterview.training.console import Console


def show_accuracies(
    title: str, accuracies: Mapping[str, float], probe: Probe, labelled: int, tested: int, console: Console
) -> None:
    """A row for each encoder, with the standard error that so many test images leave.

    Args:
        labelled, tested: as in `show_rows`.
    """
    rows = [
        (name, f"{accuracy:.1%}", f"± {standard_error(accuracy, tested):.1%}")
        for name, accuracy in accuracies.items()
    ]
    show_rows(title, ["features", "accuracy", "standard error"], rows, probe, labelled, tested, console)


def show_rows(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    probe: Probe,
    labelled: int,
    tested: int,
    console: Console,
) -> None:
    """A table whose title says what was measured on how many images, and what chance would give.

    Args:
        labelled, tested: training and test images that could be read.
    """
    missing = unreadable(probe, labelled, tested)
    if missing:
        console.warn(f"{missing} image(s) could not be read and were left out")
    chance = f"chance {1 / probe.images.classes:.1%}"
    console.table(f"{title}; {labelled} labelled, {tested} test images, {chance}", columns, rows)


def unreadable(probe: Probe, labelled: int, tested: int) -> int:
    """How many of the images that were asked for are left out, if so many were read."""
    return len(probe.chosen) + len(probe.images.test) - labelled - tested


def record(
    protocol: str,
    config: KnnConfig | LinearConfig,
    probe: Probe,
    settings: Mapping[str, Any],
    missing: int,
    accuracies: Any,
    argv: Sequence[str],
) -> None:
    """Write a probe's result into its run's results folder; nothing for a weights file outside a run.

    Args:
        protocol: the file's name, to which features, ema and the number of labels are added where given.
        settings: those of the protocol, beside those of the probe.
        missing: how many images could not be read.
    """
    given = config.probe
    details = (protocol, given.features, "ema" if given.ema else None, given.labels)
    shared = {name: getattr(given, name) for name in field_specs(ProbeConfig) if name != "run"}
    results.record(
        given.run,
        given.ema,
        "-".join(str(part) for part in details if part is not None),
        argv,
        {**shared, "features": probe.kind, **settings},
        {**probe.images.record(len(probe.chosen)), "unreadable": missing},
        {"classes": probe.images.classes, "accuracies": accuracies},
    )
