"""Statistics that decide if pre-training helped: confidence intervals, and the verdict with its sentence.

The data of a comparison of two arms are, for each of M test images and each of S seeds, which arms
classify the image correctly. Seeds are paired: with the same seed both arms use the same labelled
images. Both the seeds and the test images are random samples, so the squared half width of the 95%
interval of the mean difference is a sum of two terms, each with the quantile of Student's t
distribution for its degrees of freedom:

    half width² = t(S-1)² · variance over seeds of the difference / S
                + t(M-1)² · variance over images of the difference / M

where the difference of an image is its mean over the seeds. The variance of the mean in this two-way
layout is not larger than the sum of the expectations of both terms (the interaction of seeds and
images is in both), and such an interval with several variances has at least its nominal coverage
(Banerjee 1960). With one seed the interval consists of the second term.

The answer is "helped" if the 95% intervals of more than half of the comparisons are entirely above 0,
those of more than half of the fine-tuning comparisons are as well, and none is entirely below 0. The
majority controls the error of multiple comparisons: if nothing helps, each interval is above 0 with a
probability of at most 2.5%, so more than half of them are with at most 5%, however they depend on each
other (Rüger 1978). The answer is "did not help" if all intervals end below the smallest gain that
matters; a conjunction needs no correction for multiple comparisons. The answer is otherwise "cannot
tell".
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Answer = Literal["helped", "did not help", "cannot tell"]
CONFIDENCE_LEVEL = 0.95
_MIN_HALF_WIDTH = 1e-4  # a smaller half width cannot be reached with any realistic number of seeds
_MAX_SEEDS = 50  # the largest number of seeds that a sentence recommends


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and test images with its 95% interval, as fractions, not percent."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    """The mean of each seed."""
    seed_variance: float
    """Variance of the mean that is due to the choice of seeds; 0 with one seed."""
    test_variance: float
    """Variance of the mean that is due to the choice of test images."""
    images: int
    """Number of test images."""

    @property
    def clipped_interval(self) -> tuple[float, float]:
        """The interval limited to 0 to 1, the range of an accuracy."""
        return max(0.0, self.low), min(1.0, self.high)


def estimate_mean(values: np.ndarray) -> Estimate:
    """Estimate the mean of values that are given for each seed and test image.

    The sum of squares over images is increased by 1, which stands for half an image in favour of either arm;
    otherwise the interval of two arms that never differ would have no width (Agresti and Min 2005).

    Args:
        values: float [S, M]: 1 for correct and 0 for wrong predictions, or the differences of two arms.

    Raises:
        ValueError: if there are fewer than 2 images, or no seed.
    """
    seeds, images = values.shape
    if seeds < 1 or images < 2:
        raise ValueError(f"Expected at least 1 seed and 2 test images, got {seeds} and {images}.")
    by_seed, by_image = values.mean(axis=1), values.mean(axis=0)
    mean = float(values.mean())
    seed_variance = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    test_variance = float(((by_image - mean) ** 2).sum() + 1) / (images - 1) / images
    half = math.sqrt(
        compute_t_quantile(seeds) ** 2 * seed_variance + compute_t_quantile(images) ** 2 * test_variance
    )
    return Estimate(
        mean, mean - half, mean + half, tuple(map(float, by_seed)), seed_variance, test_variance, images
    )


@functools.cache
def compute_t_quantile(count: int) -> float:
    """Return the two-sided 95% quantile of Student's t for a mean of `count` values; 0 for one value.

    One value has no variance, so that its term of the interval is left out.
    """
    from scipy.stats import t as student  # imported here since the import takes a second

    return float(student.ppf((1 + CONFIDENCE_LEVEL) / 2, count - 1)) if count > 1 else 0.0


@dataclass(frozen=True)
class Contrast:
    """The accuracies of an arm and of a baseline, by one protocol with one number of labelled images."""

    baseline: str
    """``scratch``, ``random encoder``, ``raw pixels``, or the name of another arm."""
    ours: float
    """Mean accuracy of the arm."""
    theirs: float
    """Mean accuracy of the baseline."""
    difference: Estimate
    """Accuracy of the arm minus that of the baseline, paired by seed and test image."""


def compute_contrast(baseline: str, ours: np.ndarray, theirs: np.ndarray) -> Contrast:
    """Compare an arm with a baseline.

    Args:
        baseline: name of the baseline.
        ours, theirs: bool [S, M]: is each test image classified correctly, for each seed?
    """
    difference = estimate_mean(ours.astype(np.float64) - theirs.astype(np.float64))
    return Contrast(baseline, float(ours.mean()), float(theirs.mean()), difference)


@dataclass(frozen=True)
class Comparison:
    """An arm and its baselines, by one protocol with one number of labelled images."""

    protocol: str
    """``finetune``, ``linear`` or ``knn``."""
    labels: int
    """Number of labelled training images."""
    contrasts: tuple[Contrast, ...]
    """One for each baseline; the first baseline is the same network with random weights."""

    @property
    def hardest_contrast(self) -> Contrast:
        """The contrast with the strongest baseline, which has the smallest difference."""
        return min(self.contrasts, key=lambda c: c.difference.mean)

    @property
    def is_better(self) -> bool:
        """True if the arm is clearly better than every baseline; features must beat raw pixels too."""
        return all(c.difference.low > 0 for c in self.contrasts)

    @property
    def is_behind_pixels(self) -> bool:
        """True if raw pixels are clearly better, which the verdict mentions but does not count as harm."""
        return any(c.difference.high < 0 for c in self.contrasts if c.baseline == "raw pixels")

    @property
    def is_worse(self) -> bool:
        """True if random weights are clearly better; raw pixels do not count here."""
        return self.contrasts[0].difference.high < 0

    def is_gain_ruled_out(self, min_difference: float) -> bool:
        """Return True if a gain of `min_difference` (a fraction) over some baseline is ruled out."""
        return any(c.difference.high < min_difference for c in self.contrasts)


@dataclass(frozen=True)
class Verdict:
    """The answer to the question if pre-training helped, for one arm."""

    arm: str
    answer: Answer
    sentence: str
    """The answer as a sentence with accuracies, intervals and numbers of seeds and images."""


def decide_verdict(arm: str, comparisons: Sequence[Comparison], min_difference: float) -> Verdict:
    """Decide if the pre-training of an arm helped, by the rule in the docstring of this module.

    Args:
        arm: name of the arm.
        comparisons: at least one.
        min_difference: the smallest gain of accuracy that matters, as a fraction.

    Raises:
        ValueError: if there is no comparison.
    """
    if not comparisons:
        raise ValueError("Expected at least one comparison, got none.")
    finetuned = [c for c in comparisons if c.protocol == "finetune"]
    better, worse = sum(c.is_better for c in comparisons), sum(c.is_worse for c in comparisons)
    total = len(comparisons)
    is_enough = _is_majority_better(comparisons) and (not finetuned or _is_majority_better(finetuned))
    accuracies = _format_accuracies(comparisons)
    has_one_seed = all(len(c.hardest_contrast.difference.by_seed) == 1 for c in comparisons)
    caveat = " (from one seed: the variance between seeds is unknown)" if has_one_seed else ""
    if is_enough and not worse:
        count = "in every comparison" if better == total else f"in {better} of {total} comparisons"
        others = "" if better == total else ", and behind random weights in none"
        if num_behind_pixels := sum(c.is_behind_pixels for c in comparisons):
            others += f", though raw pixels are ahead in {num_behind_pixels}"
        return Verdict(
            arm,
            "helped",
            f"Pre-training helped: {arm}, {accuracies}; it is clearly better {count}{others}{caveat}.",
        )
    if all(c.is_gain_ruled_out(min_difference) for c in comparisons):
        harm = f", and in {worse} of {total} comparisons it did harm" if worse else ""
        gain = "a gain" if total == 1 else "in every comparison a gain"
        return Verdict(
            arm,
            "did not help",
            f"Pre-training did not help: {arm}, {accuracies}; {gain} of {_format_points(min_difference)} or "
            f"more is ruled out{harm}{caveat}.",
        )
    reason = _explain_uncertainty(comparisons, finetuned, min_difference)
    return Verdict(
        arm, "cannot tell", f"Cannot tell whether pre-training helped: {arm}, {accuracies}; {reason}."
    )


def _is_majority_better(comparisons: Sequence[Comparison]) -> bool:
    return 2 * sum(c.is_better for c in comparisons) > len(comparisons)


_PROTOCOL_PHRASES = {
    "finetune": "fine-tuned on {} labelled images",
    "linear": "with a linear classifier on frozen features and {} labelled images",
    "knn": "by nearest neighbours among {} labelled images",
}
_BASELINE_PHRASES = {
    "scratch": "from random weights",
    "random encoder": "with random weights",
    "raw pixels": "with raw pixels",
}


def _format_accuracies(comparisons: Sequence[Comparison]) -> str:
    """Return accuracies, intervals and sample sizes of one protocol, the first that is evaluated.

    At most three numbers of labelled images are listed: the smallest, the middle and the largest.
    """
    protocol = next(p for p in _PROTOCOL_PHRASES if any(c.protocol == p for c in comparisons))
    rows = sorted((c for c in comparisons if c.protocol == protocol), key=lambda c: c.labels)
    if len(rows) > 3:
        rows = [rows[0], rows[len(rows) // 2], rows[-1]]
    parts = []
    for i, row in enumerate(rows):
        hardest = row.hardest_contrast
        seeds, images = len(hardest.difference.by_seed), hardest.difference.images
        accuracies = f"{hardest.ours:.1%} against {hardest.theirs:.1%}"
        mean, interval = format_signed_points(hardest.difference.mean), format_interval(hardest.difference)
        if i == 0:
            phrase = _PROTOCOL_PHRASES[protocol].format(f"{row.labels:,}")
            parts.append(
                f"{phrase}, reaches {accuracies} {_BASELINE_PHRASES[hardest.baseline]} ({mean} points, 95% "
                f"interval {interval}, {_format_count(seeds, 'seed')}, {images:,} test images)"
            )
        else:
            parts.append(f"on {row.labels:,} {accuracies} ({mean}; {interval})")
    return ", ".join(parts)


def _explain_uncertainty(
    comparisons: Sequence[Comparison], finetuned: Sequence[Comparison], min_difference: float
) -> str:
    """Return why the answer is "cannot tell", and what more data would decide it."""
    better, worse = sum(c.is_better for c in comparisons), sum(c.is_worse for c in comparisons)
    total = len(comparisons)
    if better and worse:
        return f"of {total} comparisons {better} are clear gains and {worse} are clear losses"
    undecided = [c for c in comparisons if not c.is_better and not c.is_gain_ruled_out(min_difference)]
    if not undecided:
        names = ", ".join(f"{c.protocol} on {c.labels:,}" for c in comparisons if c.is_better)
        return (
            f"only {better} of {total} comparisons show a clear gain ({names}), and the others rule out a "
            f"gain of {_format_points(min_difference)}"
        )
    candidates = [c for c in undecided if c in finetuned] or undecided
    nearest = max(
        candidates,
        key=lambda c: (
            _compute_required_half_width(c, min_difference)
            - _compute_half_width(c.hardest_contrast.difference)
        ),
    )
    gain = f"{better or 'none'} of {_format_count(total, 'comparison')} {'show' if better > 1 else 'shows'}"
    leave = "1 leaves" if len(undecided) == 1 else f"{len(undecided)} leave"
    return (
        f"{gain} a clear gain, and {leave} open both no gain and a gain of {_format_points(min_difference)}; "
        f"{describe_required_data(nearest.hardest_contrast.difference, min_difference)}"
    )


def _compute_half_width(estimate: Estimate) -> float:
    return (estimate.high - estimate.low) / 2


def _compute_required_half_width(comparison: Comparison, min_difference: float) -> float:
    """Return the largest half width at which the interval would exclude either 0 or `min_difference`."""
    mean = comparison.hardest_contrast.difference.mean
    return max(mean, min_difference - mean)


def describe_required_data(estimate: Estimate, min_difference: float) -> str:
    """Describe the data that would decide a comparison, if its true difference is about the estimated one.

    A comparison is decided when its interval excludes either 0 from below or `min_difference` from above,
    whichever needs less data.
    """
    return describe_data_for_half_width(estimate, max(estimate.mean, min_difference - estimate.mean))


def describe_data_for_half_width(estimate: Estimate, half_width: float) -> str:
    """Describe the number of seeds or test images that would narrow an interval to less than `half_width`.

    The mean and the variances are assumed to stay as they are.
    """
    if half_width < _MIN_HALF_WIDTH:
        return "the two are equal as far as can be measured, and more seeds would not decide it"
    seeds, target = len(estimate.by_seed), half_width**2
    if seeds == 1:
        return "with one seed the variance between seeds is unknown: give --seeds 3 or more"
    test = compute_t_quantile(estimate.images) ** 2 * estimate.test_variance
    for count in range(seeds + 1, _MAX_SEEDS + 1):
        if compute_t_quantile(count) ** 2 * estimate.seed_variance * seeds / count + test < target:
            return f"about {count} seeds would decide it (these were {seeds})"
    images = math.ceil(2 * test / target * estimate.images)
    if images > estimate.images:
        unit = 10 ** (len(str(images)) - 1)
        return (
            f"about {math.ceil(images / unit) * unit:,} test images and more seeds would decide it (these "
            f"were {estimate.images:,} and {seeds})"
        )
    return f"the results of seeds vary so much that more than {_MAX_SEEDS} would be needed to decide it"


def format_signed_points(fraction: float) -> str:
    """Format a difference of fractions in percentage points: ``+1.2`` or ``−0.3``."""
    points = round(100 * fraction, 1)
    return f"{'−' if points < 0 else '+'}{abs(points):.1f}"


def format_interval(estimate: Estimate) -> str:
    """Format the interval of a difference in percentage points: ``−0.3 to +1.2``."""
    return f"{format_signed_points(estimate.low)} to {format_signed_points(estimate.high)}"


def _format_points(fraction: float) -> str:
    return _format_count(round(100 * fraction, 2), "point")


def _format_count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
