"""When a finding of the paper counts as reproduced. Fixed before any run, and never decided by eye.

Two arms are compared by the test images that each told right, seeds paired: a seed gives both the same
labelled images and the same order. The 95% interval of their difference is that of `evaluate.verdict`:
it has a part for the seeds and a part for the test images. A finding that one arm is ahead is

    reproduced       if the whole interval lies above 0,
    not reproduced   if it lies below 0,
    cannot tell      otherwise, or from a single seed.

A finding that one arm is as good as another is reproduced if the whole interval lies above minus the
margin, which is a point, and not reproduced if it lies below that.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from quarterview.studies.study import Finding
from quarterview.studies.verdict import Estimate, estimate, narrower, signed

Answer = Literal["reproduced", "not reproduced", "cannot tell"]
MARGIN = 0.01
"""By which an arm may be behind another and count as good."""


@dataclass(frozen=True)
class Outcome:
    """What came of a finding."""

    finding: Finding
    answer: Answer
    difference: Estimate
    """Of the shares of test images told right, the first arm's less the other's."""
    sentence: str
    """The figures, and what it would take if it cannot be told."""


def decide(
    finding: Finding,
    first: np.ndarray,
    second: np.ndarray,
    over: tuple[np.ndarray, np.ndarray] | None = None,
) -> Outcome:
    """Compare two arms, or what they gain over others.

    Args:
        first, second: bool [S, M], which test images the finding's two arms told right under each seed.
        over: likewise of the arms that are taken off.
    """
    one, two = first.astype(np.float64), second.astype(np.float64)
    if over is not None:
        one, two = one - over[0], two - over[1]
    difference = estimate(one - two)
    edge = 0.0 if finding.rule == "ahead" else -MARGIN
    seeds = len(difference.by_seed)
    answer: Answer = "cannot tell"
    if seeds > 1 and difference.low > edge:
        answer = "reproduced"
    elif seeds > 1 and difference.high < edge:
        answer = "not reproduced"
    shown = signed if over is not None else _share
    names = [finding.first, finding.second]
    if finding.second_measure is not None:
        names = [f"{names[0]} ({finding.measure})", f"{names[1]} ({finding.second_measure})"]
    figures = (
        f"{names[0]} {shown(float(one.mean()))}, {names[1]} {shown(float(two.mean()))}: "
        f"{signed(difference.mean)} points, 95% interval {signed(difference.low)} to "
        f"{signed(difference.high)}, {seeds} seed{'s' if seeds > 1 else ''}"
    )
    if answer == "cannot tell":
        figures += "; " + narrower(difference, abs(difference.mean - edge))
    return Outcome(finding, answer, difference, figures)


def _share(share: float) -> str:
    return f"{share:.1%}"
