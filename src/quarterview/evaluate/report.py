"""Tables of accuracies."""

import math
from collections.abc import Mapping

from quarterview.evaluate.features import ProbeData
from quarterview.train.journal import Journal


def show_accuracies(title: str, accuracies: Mapping[str, float], data: ProbeData, journal: Journal) -> None:
    """A row for each encoder, with the standard error that so many test images leave."""
    count = len(data.test_labels)
    rows = [
        (name, f"{accuracy:.1%}", f"± {math.sqrt(accuracy * (1 - accuracy) / count):.1%}")
        for name, accuracy in accuracies.items()
    ]
    title = f"{title}; {len(data.train_labels)} labelled, {count} test images, chance {1 / data.classes:.1%}"
    if data.unreadable:
        journal.warn(f"{data.unreadable} image(s) could not be read and were left out")
    journal.table(title, ["features", "accuracy", "standard error"], rows)
