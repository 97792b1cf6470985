"""``quarterview knn``: evaluate features by k-nearest-neighbour classification."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from quarterview.commands.config import KnnConfig
from quarterview.commands.probe_results import count_unreadable, print_rows, record_probe
from quarterview.commands.required import require_flags
from quarterview.evaluation.knn import (
    TEMPERATURE,
    KnnAccuracy,
    Vote,
    check_num_neighbors,
    compute_knn_accuracies,
)
from quarterview.evaluation.probe import open_probe
from quarterview.training.console import Console


def main(config: KnnConfig, argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    evaluate_knn(config, Console(), argv)
    return 0


def evaluate_knn(config: KnnConfig, console: Console, argv: Sequence[str] = ()) -> list[KnnAccuracy]:
    """Classify the test images by their nearest training images, print a table and record the result.

    Args:
        config: images, encoder and number of neighbours.
        console: prints the table.
        argv: the command line, for the record.

    Returns:
        The accuracy of each encoder, for each k and both kinds of vote.

    Raises:
        UserError: if the images cannot be used, or there are fewer training images than neighbours.
    """
    require_flags(config, "run")
    ks = tuple(dict.fromkeys(config.classifier.k))
    probe = open_probe(config.images, config.probe)
    features = probe.extract_features()
    num_train, num_test = next((len(f.train_labels), len(f.test_labels)) for f in features.values())
    check_num_neighbors(ks, num_train)
    accuracies = compute_knn_accuracies(features, ks, probe.device)

    title = f"nearest neighbours, cosine, {probe.pool} features"
    columns = ["features", "k", *get_args(Vote), "standard error"]
    print_rows(title, columns, _make_rows(accuracies), probe, num_train, num_test, console)
    settings = {"k": ks, "metric": "cosine", "temperature": TEMPERATURE}
    num_unreadable = count_unreadable(probe, num_train, num_test)
    record_probe("knn", config, probe, settings, num_unreadable, [asdict(row) for row in accuracies], argv)
    return accuracies


def _make_rows(accuracies: Sequence[KnnAccuracy]) -> list[tuple[str, ...]]:
    """Make a row for each encoder and k: accuracy by each kind of vote, and the larger standard error."""
    cells: dict[tuple[str, int], list[KnnAccuracy]] = {}
    for row in accuracies:
        cells.setdefault((row.features, row.k), []).append(row)
    return [
        (name, str(k), *(f"{vote.accuracy:.1%}" for vote in votes), f"± {_get_max_error(votes):.1%}")
        for (name, k), votes in cells.items()
    ]


def _get_max_error(votes: Sequence[KnnAccuracy]) -> float:
    return max(vote.standard_error for vote in votes)
