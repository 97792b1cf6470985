"""The rule that decides if a study reproduces a finding of the paper; it was fixed before any run.

Two arms are compared by the test images that each classifies correctly. Seeds are paired: with the same
seed both arms have the same labelled images in the same order. The difference of their accuracies has the
95% interval of `quarterview.studies.verdict`, which includes the variance over seeds and over test images.
A finding that one arm is ahead of another is

    reproduced       if the whole interval is above 0,
    not reproduced   if the whole interval is below 0,
    cannot tell      otherwise, or with a single seed.

A finding that one arm is as good as another (non-inferiority) is reproduced if the whole interval is above
minus the margin, which is one percentage point, and not reproduced if the whole interval is below that.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from quarterview.studies.study import Finding
from quarterview.studies.verdict import (
    Estimate,
    describe_data_for_half_width,
    estimate_mean,
    format_interval,
    format_signed_points,
)

FindingAnswer = Literal["reproduced", "not reproduced", "cannot tell"]
NON_INFERIORITY_MARGIN = 0.01
"""Largest loss of accuracy, as a fraction, with which an arm counts as good as another."""


@dataclass(frozen=True)
class FindingResult:
    """The decision on a finding, with the difference that it depends on."""

    finding: Finding
    answer: FindingAnswer
    difference: Estimate
    """Accuracy of the first arm minus that of the second; with baselines, the difference of the gains."""
    sentence: str
    """Accuracies and interval, and the data that would decide it if the answer is "cannot tell"."""


def decide_finding(
    finding: Finding,
    first: np.ndarray,
    second: np.ndarray,
    baselines: tuple[np.ndarray, np.ndarray] | None = None,
) -> FindingResult:
    """Decide if a finding is reproduced, by comparing two arms or their gains over baselines.

    Args:
        first, second: bool [S, M]: does each arm of the finding classify each test image correctly, for each
            seed?
        baselines: the same for the baselines of the first and the second arm (`Finding.over`).
    """
    one, two = first.astype(np.float64), second.astype(np.float64)
    if baselines is not None:
        one, two = one - baselines[0], two - baselines[1]
    difference = estimate_mean(one - two)
    threshold = 0.0 if finding.rule == "ahead" else -NON_INFERIORITY_MARGIN
    seeds = len(difference.by_seed)
    answer: FindingAnswer = "cannot tell"
    if seeds > 1 and difference.low > threshold:
        answer = "reproduced"
    elif seeds > 1 and difference.high < threshold:
        answer = "not reproduced"
    format_mean = format_signed_points if baselines is not None else _format_percent
    names = [finding.first, finding.second]
    if finding.second_measure is not None:
        names = [f"{names[0]} ({finding.measure})", f"{names[1]} ({finding.second_measure})"]
    sentence = (
        f"{names[0]} {format_mean(float(one.mean()))}, {names[1]} {format_mean(float(two.mean()))}: "
        f"{format_signed_points(difference.mean)} points, 95% interval {format_interval(difference)}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )
    if answer == "cannot tell":
        sentence += "; " + describe_data_for_half_width(difference, abs(difference.mean - threshold))
    return FindingResult(finding, answer, difference, sentence)


def _format_percent(fraction: float) -> str:
    return f"{fraction:.1%}"
