"""``quarterview knn``: how good features are without any training on them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from quarterview.commands.config import KnnConfig
from quarterview.commands.probe_results import record, show_rows, unreadable
from quarterview.commands.required import require
from quarterview.evaluation.knn import TEMPERATURE, KnnAccuracy, Vote, check_neighbours, knn_accuracies
from quarterview.evaluation.probe import open_probe
from quarterview.training.console import Console


def main(config: KnnConfig, argv: Sequence[str]) -> int:
    """Carry out the command, and return its exit code."""
    knn(config, Console(), argv)
    return 0


def knn(config: KnnConfig, console: Console, argv: Sequence[str] = ()) -> list[KnnAccuracy]:
    """Classify the test images by their nearest training images, show a table and record the result.

    Args:
        argv: the command line, for the record.

    Returns:
        The accuracy of each encoder, for each k and both ways of voting.

    Raises:
        UserError: if the images cannot be compared, or there are fewer training images than neighbours.
    """
    require(config, "run")
    ks = tuple(dict.fromkeys(config.classifier.k))
    probe = open_probe(config.images, config.probe)
    features = probe.features()
    labelled, tested = next((len(f.train_labels), len(f.test_labels)) for f in features.values())
    check_neighbours(ks, labelled)
    found = knn_accuracies(features, ks, probe.device)

    title = f"nearest neighbours, cosine, {probe.kind} features"
    columns = ["features", "k", *get_args(Vote), "standard error"]
    show_rows(title, columns, _rows(found), probe, labelled, tested, console)
    settings = {"k": ks, "metric": "cosine", "temperature": TEMPERATURE}
    missing = unreadable(probe, labelled, tested)
    record("knn", config, probe, settings, missing, [asdict(row) for row in found], argv)
    return found


def _rows(found: Sequence[KnnAccuracy]) -> list[tuple[str, ...]]:
    """A row for each encoder and k, with a column for each way of voting and the larger standard error."""
    cells: dict[tuple[str, int], list[KnnAccuracy]] = {}
    for row in found:
        cells.setdefault((row.features, row.k), []).append(row)
    return [
        (name, str(k), *(f"{vote.accuracy:.1%}" for vote in votes), f"± {_largest_error(votes):.1%}")
        for (name, k), votes in cells.items()
    ]


def _largest_error(votes: Sequence[KnnAccuracy]) -> float:
    return max(vote.standard_error for vote in votes)
