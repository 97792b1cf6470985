"""Did pre-training help? The statistics behind the answer, and the sentence that gives it.

What is known of a comparison is whether each of M test images was told right by each of two arms,
under each of S seeds. Seeds are paired: both arms saw the same labelled images. Two things could
have come out otherwise, the seeds and the test images, so the interval of the mean difference has
two parts, each with Student's quantile of its own degrees of freedom,

    half width² = t(S-1)² · variance of the seeds' differences / S
                + t(M-1)² · variance of the images' differences / M

where an image's difference is its mean over the seeds. The variance of the mean in the two-way
layout is not larger than the sum of both estimates' expectations (what seeds and images do together
is in both), and such an interval of several variances covers at least as often as it says (Banerjee
1960). With one seed only the second part is there.

The answer is "helped" if more than half of the comparisons lie above 0 with their whole 95%
interval, so do more than half of those by fine-tuning, and none lies below 0. Asking for a
majority is what guards against many comparisons: where nothing helps, each lies above 0 with a
probability of at most 2.5%, so more than half of them do with at most 5%, however they depend on
each other (Rüger 1978). The answer is "did not help" if all intervals end below the smallest gain
worth having; a conjunction needs no such guard. Anything else is "cannot tell".
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Answer = Literal["helped", "did not help", "cannot tell"]
LEVEL = 0.95
_NO_DIFFERENCE = 1e-4
_MOST_SEEDS = 50
"""Nobody is told to run more."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and test images, and its 95% interval; as shares, not percent."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    """The mean of each seed."""
    seed_variance: float
    """Of the mean, as far as the seeds are to blame; 0 if there is one."""
    test_variance: float
    """Of the mean, as far as the test images are."""
    images: int
    """How many test images there are."""

    @property
    def as_share(self) -> tuple[float, float]:
        """The interval of an accuracy, which ends at 0 and 1."""
        return max(0.0, self.low), min(1.0, self.high)


def estimate(values: np.ndarray) -> Estimate:
    """The mean of a figure that each test image has under each seed.

    To the images' sum of squares 1 is added, half an image for and half an image against, without
    which two arms that never differ would be equal beyond doubt (Agresti and Min 2005).

    Args:
        values: float [S, M]: 0 and 1 for wrong and right, or the differences of two arms.

    Raises:
        ValueError: if there are fewer than 2 images, or no seed.
    """
    seeds, images = values.shape
    if seeds < 1 or images < 2:
        raise ValueError(f"{seeds} seeds and {images} test images; accepted: at least 1 and 2")
    by_seed, by_image = values.mean(axis=1), values.mean(axis=0)
    mean = float(values.mean())
    seed_variance = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    test_variance = float(((by_image - mean) ** 2).sum() + 1) / (images - 1) / images
    half = math.sqrt(quantile(seeds) ** 2 * seed_variance + quantile(images) ** 2 * test_variance)
    return Estimate(
        mean, mean - half, mean + half, tuple(map(float, by_seed)), seed_variance, test_variance, images
    )


@functools.cache
def quantile(count: int) -> float:
    """Student's two-sided 95% quantile for a mean of `count`; 0 for one, of which nothing is known."""
    from scipy.stats import t as student  # here, for it takes a second to import

    return float(student.ppf((1 + LEVEL) / 2, count - 1)) if count > 1 else 0.0


@dataclass(frozen=True)
class Contrast:
    """An arm beside one that was not pre-trained, under one protocol and count of labelled images."""

    baseline: str
    """What the arm is held against: ``scratch``, ``random encoder``, ``raw pixels``."""
    ours: float
    """The arm's mean accuracy."""
    theirs: float
    """The baseline's."""
    difference: Estimate
    """The arm's accuracy less the baseline's."""


def contrast(baseline: str, ours: np.ndarray, theirs: np.ndarray) -> Contrast:
    """Compare which test images two arms told right.

    Args:
        ours, theirs: bool [S, M].
    """
    difference = estimate(ours.astype(np.float64) - theirs.astype(np.float64))
    return Contrast(baseline, float(ours.mean()), float(theirs.mean()), difference)


@dataclass(frozen=True)
class Comparison:
    """One protocol at one count of labelled images, against all that the arm has to beat."""

    protocol: str
    """``finetune``, ``linear`` or ``knn``."""
    labels: int
    """How many labelled training images were used."""
    contrasts: tuple[Contrast, ...]
    """The first is against the same network with random weights."""

    @property
    def hardest(self) -> Contrast:
        """The contrast with the smallest difference."""
        return min(self.contrasts, key=lambda c: c.difference.mean)

    @property
    def better(self) -> bool:
        """Whether everything is beaten: features that raw pixels equal are no help."""
        return all(c.difference.low > 0 for c in self.contrasts)

    @property
    def behind_pixels(self) -> bool:
        """Whether raw pixels did clearly better: no harm from pre-training, but worth knowing."""
        return any(c.difference.high < 0 for c in self.contrasts if c.baseline == "raw pixels")

    @property
    def worse(self) -> bool:
        """Whether random weights did better. Raw pixels may, without any harm from pre-training."""
        return self.contrasts[0].difference.high < 0

    def no_gain(self, worthwhile: float) -> bool:
        """Whether a gain worth having is ruled out."""
        return any(c.difference.high < worthwhile for c in self.contrasts)


@dataclass(frozen=True)
class Verdict:
    """The answer about one arm."""

    arm: str
    answer: Answer
    sentence: str
    """For people to quote, with the figures."""


def judge(arm: str, comparisons: Sequence[Comparison], worthwhile: float) -> Verdict:
    """Say whether pre-training helped, or that it cannot be told.

    Args:
        arm: its name.
        comparisons: at least one.
        worthwhile: the smallest gain worth having, as a share.

    Raises:
        ValueError: if there is no comparison.
    """
    if not comparisons:
        raise ValueError("no comparison; accepted: at least one")
    tuned = [c for c in comparisons if c.protocol == "finetune"]
    better, worse = sum(c.better for c in comparisons), sum(c.worse for c in comparisons)
    total = len(comparisons)
    enough = _majority(comparisons) and (not tuned or _majority(tuned))
    figures = _figures(comparisons)
    lone = all(len(c.hardest.difference.by_seed) == 1 for c in comparisons)
    caveat = " (from one seed: what another would give is not known)" if lone else ""
    if enough and not worse:
        count = "in every comparison" if better == total else f"in {better} of {total} comparisons"
        none = "" if better == total else ", and behind random weights in none"
        if pixels := sum(c.behind_pixels for c in comparisons):
            none += f", though raw pixels are ahead in {pixels}"
        return Verdict(
            arm,
            "helped",
            f"Pre-training helped: {arm}, {figures}; it is clearly better {count}{none}{caveat}.",
        )
    if all(c.no_gain(worthwhile) for c in comparisons):
        harm = f", and in {worse} of {total} comparisons it did harm" if worse else ""
        gain = "a gain" if total == 1 else "in every comparison a gain"
        return Verdict(
            arm,
            "did not help",
            f"Pre-training did not help: {arm}, {figures}; {gain} of {_points(worthwhile)} or more is "
            f"ruled out{harm}{caveat}.",
        )
    reason = _doubt(comparisons, tuned, worthwhile)
    return Verdict(
        arm, "cannot tell", f"Cannot tell whether pre-training helped: {arm}, {figures}; {reason}."
    )


def _majority(comparisons: Sequence[Comparison]) -> bool:
    return 2 * sum(c.better for c in comparisons) > len(comparisons)


_DONE = {
    "finetune": "fine-tuned on {} labelled images",
    "linear": "with a linear classifier on frozen features and {} labelled images",
    "knn": "by nearest neighbours among {} labelled images",
}
_INSTEAD = {
    "scratch": "from random weights",
    "random encoder": "with random weights",
    "raw pixels": "with raw pixels",
}


def _figures(comparisons: Sequence[Comparison]) -> str:
    """The figures of the protocol that counts most, at up to three counts of labels."""
    protocol = next(p for p in _DONE if any(c.protocol == p for c in comparisons))
    rows = sorted((c for c in comparisons if c.protocol == protocol), key=lambda c: c.labels)
    if len(rows) > 3:
        rows = [rows[0], rows[len(rows) // 2], rows[-1]]
    parts = []
    for i, row in enumerate(rows):
        hardest = row.hardest
        seeds, images = len(hardest.difference.by_seed), hardest.difference.images
        basis = f"95% interval {signed(hardest.difference.low)} to {signed(hardest.difference.high)}"
        if i == 0:
            basis += f", {_count(seeds, 'seed')}, {images:,} test images"
        how = _DONE[protocol].format(f"{row.labels:,}") if i == 0 else f"on {row.labels:,}"
        parts.append(
            f"{how}, reaches {hardest.ours:.1%} against {hardest.theirs:.1%} {_INSTEAD[hardest.baseline]} "
            f"({signed(hardest.difference.mean)} points, {basis})"
            if i == 0
            else f"{how} {hardest.ours:.1%} against {hardest.theirs:.1%} ({signed(hardest.difference.mean)}; "
            f"{signed(hardest.difference.low)} to {signed(hardest.difference.high)})"
        )
    return ", ".join(parts)


def _doubt(comparisons: Sequence[Comparison], tuned: Sequence[Comparison], worthwhile: float) -> str:
    """Why it cannot be told, and what would settle it."""
    better, worse = sum(c.better for c in comparisons), sum(c.worse for c in comparisons)
    total = len(comparisons)
    if better and worse:
        return f"of {total} comparisons {better} clearly gain and {worse} clearly lose: no single answer"
    undecided = [c for c in comparisons if not c.better and not c.no_gain(worthwhile)]
    if not undecided:
        kinds = ", ".join(f"{c.protocol} on {c.labels:,}" for c in comparisons if c.better)
        clear = f"only {better} of {total} comparisons show a clear gain ({kinds})"
        return f"it depends on the use: {clear}, and the others rule one out"
    first = [c for c in undecided if c in tuned] or undecided
    nearest = max(first, key=lambda c: _decision(c, worthwhile) - _half(c.hardest.difference))
    gain = f"{better or 'none'} of {_count(total, 'comparison')} {'show' if better > 1 else 'shows'}"
    leave = "1 leaves" if len(undecided) == 1 else f"{len(undecided)} leave"
    return (
        f"{gain} a clear gain, and {leave} room for both none and {_points(worthwhile)}; "
        f"{needed(nearest.hardest.difference, worthwhile)}"
    )


def _half(found: Estimate) -> float:
    return (found.high - found.low) / 2


def _decision(comparison: Comparison, worthwhile: float) -> float:
    """The half width at which a comparison would be decided, one way or the other."""
    mean = comparison.hardest.difference.mean
    return max(mean, worthwhile - mean)


def needed(found: Estimate, worthwhile: float) -> str:
    """What would decide a comparison whose true difference is about the one that was seen.

    It is decided when the interval excludes either 0 from below or the smallest gain worth having
    from above, whichever is nearer to hand.
    """
    return narrower(found, max(found.mean, worthwhile - found.mean))


def narrower(found: Estimate, half: float) -> str:
    """What would make an interval reach less than so far from its mean, if that stays where it is."""
    if half < _NO_DIFFERENCE:
        return "as far as can be seen the two are alike, which no number of seeds would settle"
    seeds, target = len(found.by_seed), half**2
    if seeds == 1:
        return "with one seed nothing is known of what another would give: --seeds 3 or more would tell"
    test = quantile(found.images) ** 2 * found.test_variance
    for count in range(seeds + 1, _MOST_SEEDS + 1):
        if quantile(count) ** 2 * found.seed_variance * seeds / count + test < target:
            return f"about {count} seeds would decide it (these were {seeds})"
    images = math.ceil(2 * test / target * found.images)
    if images > found.images:
        unit = 10 ** (len(str(images)) - 1)
        return (
            f"about {math.ceil(images / unit) * unit:,} test images and more seeds would decide it (these "
            f"were {found.images:,} and {seeds})"
        )
    return f"seeds differ so much that more than {_MOST_SEEDS} would be needed to decide it"


def signed(share: float) -> str:
    """A difference in points: +1.2 or −0.3."""
    points = round(100 * share, 1)
    return f"{'−' if points < 0 else '+'}{abs(points):.1f}"


def _points(share: float) -> str:
    return _count(round(100 * share, 2), "point")


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
