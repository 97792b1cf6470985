"""Output and record of the commands knn and linear."""

from collections.abc import Mapping, Sequence
from typing import Any

from quarterview.commands.config import KnnConfig, LinearConfig
from quarterview.config import get_field_specs
from quarterview.evaluation import results
from quarterview.evaluation.config import ProbeConfig
from quarterview.evaluation.probe import Probe
from quarterview.evaluation.statistics import compute_standard_error
from quarterview.training.console import Console


def print_accuracies(
    title: str, accuracies: Mapping[str, float], probe: Probe, num_train: int, num_test: int, console: Console
) -> None:
    """Print a table with the accuracy of each encoder and its standard error.

    Args:
        title: title of the table.
        accuracies: test accuracies by encoder.
        probe: the images and encoders.
        num_train, num_test: as in `print_rows`.
        console: prints the table.
    """
    rows = [
        (name, f"{accuracy:.1%}", f"± {compute_standard_error(accuracy, num_test):.1%}")
        for name, accuracy in accuracies.items()
    ]
    print_rows(title, ["features", "accuracy", "standard error"], rows, probe, num_train, num_test, console)


def print_rows(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    probe: Probe,
    num_train: int,
    num_test: int,
    console: Console,
) -> None:
    """Print a table whose title also has the numbers of images and the accuracy of chance.

    Args:
        title: title of the table.
        columns: names of the columns.
        rows: cells.
        probe: the images and encoders.
        num_train, num_test: numbers of training and test images that could be read.
        console: prints the table.
    """
    num_unreadable = count_unreadable(probe, num_train, num_test)
    if num_unreadable:
        console.warning(f"{num_unreadable} image(s) could not be read and were skipped.")
    chance = f"chance {1 / probe.split.num_train_classes:.1%}"
    console.table(f"{title}; {num_train} labelled, {num_test} test images, {chance}", columns, rows)


def count_unreadable(probe: Probe, num_train: int, num_test: int) -> int:
    """Return the number of images that could not be read, given the numbers of those that could."""
    return len(probe.labeled_ids) + len(probe.split.test) - num_train - num_test


def record_probe(
    protocol: str,
    config: KnnConfig | LinearConfig,
    probe: Probe,
    settings: Mapping[str, Any],
    num_unreadable: int,
    accuracies: Any,
    argv: Sequence[str],
) -> None:
    """Write a probe's result into the results folder of its run; nothing for a weights file outside of a run.

    Args:
        protocol: prefix of the file's name, followed by features, ema and the number of labels where given.
        config: configuration of the command.
        probe: the images and encoders.
        settings: settings of the protocol, in addition to those of the probe.
        num_unreadable: number of images that could not be read.
        accuracies: the result, as JSON.
        argv: the command line.
    """
    given = config.probe
    details = (protocol, given.features, "ema" if given.ema else None, given.labels)
    shared = {name: getattr(given, name) for name in get_field_specs(ProbeConfig) if name != "run"}
    results.record_result(
        given.run,
        given.ema,
        "-".join(str(part) for part in details if part is not None),
        argv,
        {**shared, "features": probe.pool, **settings},
        {**probe.split.describe(len(probe.labeled_ids)), "unreadable": num_unreadable},
        {"classes": probe.split.num_train_classes, "accuracies": accuracies},
    )
