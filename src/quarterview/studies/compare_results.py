"""Statistics of a comparison: accuracies, differences and verdicts, and the file that stores them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quarterview.evaluation.results import write_result
from quarterview.studies.config import PROTOCOL_NAMES, CompareConfig
from quarterview.studies.verdict import (
    Comparison,
    Contrast,
    Estimate,
    Verdict,
    compute_contrast,
    decide_verdict,
    estimate_mean,
)
from quarterview.weights.config import SCRATCH

RANDOM_ENCODER, RAW_PIXELS = "random encoder", "raw pixels"
"""Names of the baselines of frozen features."""
CompareEvaluations = dict[tuple[str, int, str], np.ndarray]
"""(protocol, number of labelled images, arm) -> bool [S, M]: is each of M test images classified correctly,
for each of S seeds?"""


@dataclass(frozen=True)
class Point:
    """The accuracy of an arm by one protocol with one number of labelled images."""

    protocol: str
    labels: int
    arm: str
    accuracy: Estimate


@dataclass(frozen=True)
class ArmDifference:
    """The difference between a pre-trained arm and the first one, by one protocol and number of labels."""

    protocol: str
    labels: int
    arm: str
    contrast: Contrast


@dataclass(frozen=True)
class CompareStatistics:
    """All results of a comparison."""

    verdicts: tuple[Verdict, ...]
    """One verdict for each pre-trained arm, in the order of the command line."""
    points: tuple[Point, ...]
    """The accuracies of all arms and baselines."""
    comparisons: Mapping[str, Sequence[Comparison]]
    """Name of a pre-trained arm -> its comparisons with baselines."""
    arm_differences: Sequence[ArmDifference]
    """The differences between pre-trained arms; empty if there is only one."""
    arms: Mapping[str, Mapping[str, Any]]
    """Name of a pre-trained arm -> its description, see `PretrainedArm.describe`."""
    min_difference: float
    """The smallest gain of accuracy that matters, as a fraction."""

    @property
    def protocol_names(self) -> dict[str, str]:
        """The protocols that were evaluated, with their names in reports."""
        evaluated = {point.protocol for point in self.points}
        return {protocol: name for protocol, name in PROTOCOL_NAMES.items() if protocol in evaluated}


def compute_statistics(
    correct: CompareEvaluations, arms: Mapping[str, Mapping[str, Any]], min_difference: float
) -> CompareStatistics:
    """Compute accuracies, differences and verdicts.

    Args:
        arms: name of each pre-trained arm -> its description.
        min_difference: the smallest gain of accuracy that matters, as a fraction.
    """
    comparisons = {name: compare_with_baselines(correct, name) for name in arms}
    return CompareStatistics(
        tuple(decide_verdict(name, rows, min_difference) for name, rows in comparisons.items()),
        tuple(_compute_accuracies(correct)),
        comparisons,
        compare_with_first_arm(correct, list(arms)),
        arms,
        min_difference,
    )


def compare_with_baselines(correct: CompareEvaluations, arm: str) -> list[Comparison]:
    """Compare an arm with random weights and, for frozen features, also with raw pixels."""
    comparisons = []
    for protocol in PROTOCOL_NAMES:
        baselines = (SCRATCH,) if protocol == "finetune" else (RANDOM_ENCODER, RAW_PIXELS)
        for count in sorted({c for p, c, name in correct if (p, name) == (protocol, arm)}):
            ours = correct[protocol, count, arm]
            contrasts = (compute_contrast(b, ours, correct[protocol, count, b]) for b in baselines)
            comparisons.append(Comparison(protocol, count, tuple(contrasts)))
    return comparisons


def compare_with_first_arm(correct: CompareEvaluations, arms: Sequence[str]) -> list[ArmDifference]:
    """Compare every other pre-trained arm with the first one, by the protocols that evaluate both."""
    first, *others = arms
    return [
        ArmDifference(
            p, count, name, compute_contrast(first, correct[p, count, name], correct[p, count, first])
        )
        for p, count, name in correct
        if name in others and (p, count, first) in correct
    ]


def _compute_accuracies(correct: CompareEvaluations) -> list[Point]:
    """Estimate all accuracies, sorted by protocol and number of labelled images."""
    order = {protocol: i for i, protocol in enumerate(PROTOCOL_NAMES)}
    rows = sorted(correct, key=lambda row: (order[row[0]], row[1]))
    return [
        Point(p, count, arm, estimate_mean(correct[p, count, arm].astype(float))) for p, count, arm in rows
    ]


def write_statistics(
    statistics: CompareStatistics,
    config: CompareConfig,
    data: Mapping[str, Any],
    notes: Sequence[str],
    argv: Sequence[str],
) -> Path:
    """Write ``results/compare.json`` into the folder of the comparison, and return its path.

    Args:
        data: description of the labelled images, see `CompareImages.describe`.
        notes: sentences that say what was left out, and why.
        argv: the command line.
    """
    results = {
        "verdicts": [asdict(verdict) for verdict in statistics.verdicts],
        "arms": dict(statistics.arms),
        "accuracies": [asdict(point) for point in statistics.points],
        "comparisons": {name: [asdict(c) for c in rows] for name, rows in statistics.comparisons.items()},
        "between": [asdict(row) for row in statistics.arm_differences],
        "notes": list(notes),
    }
    folder = Path(config.run.out) / "results"
    file = write_result(folder, "compare", argv, config.to_dict(), data, results)
    assert file is not None
    return file
