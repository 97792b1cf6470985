"""Tables of accuracies."""

import math
from collections.abc import Mapping, Sequence

from quarterview.evaluation.features import ProbeData
from quarterview.training.logging import Journal


def standard_error(accuracy: float, count: int) -> float:
    """Of an accuracy that was measured on `count` test images."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def show_accuracies(title: str, accuracies: Mapping[str, float], data: ProbeData, journal: Journal) -> None:
    """A row for each encoder, with the standard error that so many test images leave."""
    rows = [
        (name, f"{accuracy:.1%}", f"± {standard_error(accuracy, len(data.test_labels)):.1%}")
        for name, accuracy in accuracies.items()
    ]
    show_rows(title, ["features", "accuracy", "standard error"], rows, data, journal)


def show_rows(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], data: ProbeData, journal: Journal
) -> None:
    """A table whose title says what was measured on how many images, and what chance would give."""
    title = (
        f"{title}; {len(data.train_labels)} labelled, {len(data.test_labels)} test images, "
        f"chance {1 / data.classes:.1%}"
    )
    if data.unreadable:
        journal.warn(f"{data.unreadable} image(s) could not be read and were left out")
    journal.table(title, columns, rows)
