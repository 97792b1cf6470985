"""What a comparison found: accuracies, differences, verdicts, and the record of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quarterview.evaluation.results import write_result
from quarterview.studies.config import PROTOCOLS, CompareConfig
from quarterview.studies.verdict import Comparison, Contrast, Estimate, Verdict, contrast, estimate, judge
from quarterview.weights.config import SCRATCH

RANDOM, PIXELS = "random encoder", "raw pixels"
"""The baselines of frozen features."""
Correct = Mapping[tuple[str, int, str], np.ndarray]
"""By protocol, number of labelled images and arm: bool [S, M], which test images each seed gets right."""


@dataclass(frozen=True)
class Point:
    """The accuracy of an arm, by a protocol, on a number of labelled images."""

    protocol: str
    labels: int
    arm: str
    accuracy: Estimate


@dataclass(frozen=True)
class Between:
    """A further arm held against the first."""

    protocol: str
    labels: int
    arm: str
    contrast: Contrast


@dataclass(frozen=True)
class Results:
    """All that a comparison found."""

    verdicts: tuple[Verdict, ...]
    """One for each pre-trained arm."""
    points: tuple[Point, ...]
    comparisons: Mapping[str, Sequence[Comparison]]
    """By arm."""
    between: Sequence[Between]
    """Where there are several pre-trained arms, how they differ."""
    arms: Mapping[str, Mapping[str, Any]]
    """What each arm is."""
    worthwhile: float
    """The smallest gain worth having, as a share."""

    @property
    def protocols(self) -> dict[str, str]:
        """Those that were measured, and what they are called."""
        measured = {point.protocol for point in self.points}
        return {protocol: name for protocol, name in PROTOCOLS.items() if protocol in measured}


def results_of(correct: Correct, arms: Mapping[str, Mapping[str, Any]], worthwhile: float) -> Results:
    """The figures and the verdicts.

    Args:
        arms: what each pre-trained arm is, by its name.
        worthwhile: the smallest gain worth having, as a share.
    """
    compared = {name: comparisons(correct, name) for name in arms}
    return Results(
        tuple(judge(name, rows, worthwhile) for name, rows in compared.items()),
        tuple(_points(correct)),
        compared,
        between(correct, list(arms)),
        arms,
        worthwhile,
    )


def comparisons(correct: Correct, arm: str) -> list[Comparison]:
    """An arm against random weights, and for frozen features against raw pixels too."""
    found = []
    for protocol in PROTOCOLS:
        baselines = (SCRATCH,) if protocol == "finetune" else (RANDOM, PIXELS)
        for count in sorted({c for p, c, name in correct if (p, name) == (protocol, arm)}):
            ours = correct[protocol, count, arm]
            contrasts = (contrast(b, ours, correct[protocol, count, b]) for b in baselines)
            found.append(Comparison(protocol, count, tuple(contrasts)))
    return found


def between(correct: Correct, arms: Sequence[str]) -> list[Between]:
    """Every further arm against the first one, by every protocol that both were evaluated by."""
    first, *others = arms
    return [
        Between(p, count, name, contrast(first, correct[p, count, name], correct[p, count, first]))
        for p, count, name in correct
        if name in others and (p, count, first) in correct
    ]


def _points(correct: Correct) -> list[Point]:
    """The accuracy of every arm, by every protocol, at every count."""
    order = {protocol: i for i, protocol in enumerate(PROTOCOLS)}
    rows = sorted(correct, key=lambda row: (order[row[0]], row[1]))
    return [Point(p, count, arm, estimate(correct[p, count, arm].astype(float))) for p, count, arm in rows]


def write_record(
    results: Results,
    config: CompareConfig,
    data: Mapping[str, Any],
    notes: Sequence[str],
    argv: Sequence[str],
) -> Path:
    """Write ``results/compare.json`` into the comparison's folder, and return its path.

    Args:
        data: the labelled images.
        notes: what was left out, and why.
        argv: the command line.
    """
    found = {
        "verdicts": [asdict(verdict) for verdict in results.verdicts],
        "arms": dict(results.arms),
        "accuracies": [asdict(point) for point in results.points],
        "comparisons": {name: [asdict(c) for c in rows] for name, rows in results.comparisons.items()},
        "between": [asdict(row) for row in results.between],
        "notes": list(notes),
    }
    folder = Path(config.run.out) / "results"
    file = write_result(folder, "compare", argv, config.to_plain(), data, found)
    assert file is not None
    return file
