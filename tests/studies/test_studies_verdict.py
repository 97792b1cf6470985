"""The verdict: intervals cover what they should, and the answer claims no more than the figures."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from quarterview.studies.verdict import (
    Comparison,
    Contrast,
    Estimate,
    contrast,
    estimate,
    judge,
    needed,
    quantile,
    signed,
)


def found(mean, half, seeds=3, images=1000):
    """An estimate whose interval is as wide as asked, half of its variance from either source."""
    variance = half**2 / 2
    return Estimate(
        mean,
        mean - half,
        mean + half,
        (mean,) * seeds,
        variance / quantile(seeds) ** 2 if seeds > 1 else 0.0,
        variance / quantile(images) ** 2,
        images,
    )


def row(mean, half, protocol="finetune", labels=100, pixels=None, **options):
    contrasts = [Contrast("scratch", 0.5 + mean, 0.5, found(mean, half, **options))]
    if pixels is not None:
        contrasts.append(Contrast("raw pixels", 0.5 + mean, 0.5 + mean - pixels, found(pixels, half)))
    return Comparison(protocol, labels, tuple(contrasts))


def answer(*rows, worthwhile=0.01):
    return judge("mine", rows, worthwhile).answer


# ---------------------------------------------------------------------- intervals


def test_with_images_that_are_alike_the_interval_is_students_over_the_seeds():
    by_seed = np.array([0.1, 0.3, 0.2, 0.5])
    e = estimate(np.repeat(by_seed[:, None], 200_000, axis=1))
    low, high = stats.t.interval(0.95, 3, loc=by_seed.mean(), scale=stats.sem(by_seed))
    assert (e.low, e.high) == pytest.approx((low, high), abs=1e-4)
    assert e.by_seed == pytest.approx(tuple(by_seed))


def test_with_seeds_that_are_alike_it_is_students_over_the_test_images():
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=5000)
    e = estimate(np.tile(values, (3, 1)))
    low, high = stats.t.interval(0.95, 4999, loc=values.mean(), scale=stats.sem(values))
    assert (e.low, e.high) == pytest.approx((low, high), abs=1e-5)


def test_one_seed_leaves_the_error_of_the_test_set_alone():
    values = (np.arange(400) % 4 == 0).astype(float)[None]
    e = estimate(values)
    assert e.seed_variance == 0
    assert (e.high - e.low) / 2 == pytest.approx(stats.t.ppf(0.975, 399) * math.sqrt(76 / 399 / 400))


def test_arms_that_never_differ_are_not_equal_beyond_doubt():
    e = estimate(np.zeros((3, 100)))
    assert e.low < 0 < e.high < 0.03


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("seed_sd", "image_sd"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.4), (0.02, 0.2)])
def test_intervals_cover_the_true_difference_in_95_of_100_comparisons(seeds, seed_sd, image_sd):
    """Of two arms whose chances on an image differ by the arm, the seed and the image."""
    rng, images, repeats, true = np.random.default_rng(seeds), 200, 800, 0.06
    covered = 0
    for _ in range(repeats):
        by_seed = rng.normal(0, seed_sd, (seeds, 1))
        by_image = rng.choice([-image_sd, image_sd], (1, images))
        ours = rng.random((seeds, images)) < 0.5 + (true + by_seed + by_image) / 2
        theirs = rng.random((seeds, images)) < 0.5 - (true + by_seed + by_image) / 2
        e = contrast("scratch", ours, theirs).difference
        covered += e.low <= true <= e.high
    assert covered / repeats >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / repeats)


def test_an_interval_is_not_wider_than_it_must_be_where_one_source_rules():
    rng = np.random.default_rng(1)
    halves = []
    for _ in range(300):
        right = np.tile(rng.random(1000) < 0.3, (3, 1)).astype(float)
        e = estimate(right)
        halves.append((e.high - e.low) / 2)
    assert np.mean(halves) == pytest.approx(1.96 * math.sqrt(0.3 * 0.7 / 1000), rel=0.02)


@given(st.integers(1, 4), st.integers(2, 30), st.randoms(use_true_random=False))
def test_a_contrast_the_other_way_round_is_its_mirror(seeds, images, random):
    a, b = (np.array([[random.random() < 0.5 for _ in range(images)] for _ in range(seeds)]) for _ in "ab")
    one, other = contrast("b", a, b), contrast("a", b, a)
    assert one.difference.mean == pytest.approx(-other.difference.mean)
    assert one.difference.low == pytest.approx(-other.difference.high)
    assert one.difference.mean == pytest.approx(one.ours - one.theirs)


# ---------------------------------------------------------------------- answers


def test_a_clear_gain_everywhere_helped():
    assert answer(row(0.1, 0.02), row(0.05, 0.02, labels=1000)) == "helped"


def test_a_majority_is_enough_and_half_is_not():
    assert answer(row(0.1, 0.02), row(0.1, 0.02, labels=200), row(0.0, 0.02, labels=300)) == "helped"
    assert answer(row(0.1, 0.02), row(0.0, 0.02, labels=300)) == "cannot tell"


def test_features_that_win_do_not_outvote_fine_tuning_that_does_not():
    wins = [row(0.2, 0.02, "linear", n) for n in (10, 20, 30)]
    assert answer(*wins) == "helped"
    assert answer(*wins, row(0.0, 0.05)) == "cannot tell"


def test_one_loss_forbids_helped():
    gains = [row(0.1, 0.02, labels=n) for n in (10, 20, 30)]
    assert answer(*gains, row(-0.1, 0.02, labels=40)) == "cannot tell"


def test_no_gain_worth_having_did_not_help():
    assert answer(row(0.0, 0.004), row(-0.2, 0.01, labels=5)) == "did not help"
    assert answer(row(0.0, 0.02)) == "cannot tell"
    assert answer(row(0.0, 0.02), worthwhile=0.05) == "did not help"


def test_features_must_beat_raw_pixels_too_but_lose_to_them_without_harm():
    beaten, equal, worse = (row(0.2, 0.02, "knn", pixels=p) for p in (0.1, 0.0, -0.1))
    assert answer(beaten) == "helped"
    assert answer(equal) == "cannot tell"
    assert answer(worse) == "did not help"
    assert not worse.worse


@given(st.lists(st.tuples(st.floats(-0.5, 0.5), st.floats(0.001, 0.5)), min_size=1, max_size=9))
def test_adding_to_every_difference_never_makes_the_answer_worse(cells):
    order = ["did not help", "cannot tell", "helped"]
    before = answer(*(row(m, h, labels=i + 1) for i, (m, h) in enumerate(cells)))
    after = answer(*(row(m + 0.2, h, labels=i + 1) for i, (m, h) in enumerate(cells)))
    assert order.index(after) >= order.index(before)


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_nothing_is_called_help_in_at_most_one_of_twenty_worlds_without_any(shared):
    """Nine comparisons without a difference, independent or almost one and the same."""
    rng, worlds, helped = np.random.default_rng(0), 2000, 0
    half = 1.96  # of differences of standard deviation 1, whose intervals are exact
    for _ in range(worlds):
        z = math.sqrt(shared) * rng.normal() + math.sqrt(1 - shared) * rng.normal(size=9)
        cells = [row(0.1 * float(x), 0.1 * half, labels=i + 1) for i, x in enumerate(z)]
        helped += answer(*cells) == "helped"
    assert helped / worlds <= 0.05


# ---------------------------------------------------------------------- sentences


def test_the_sentence_says_the_answer_and_its_figures():
    verdict = judge("runs/x", [row(0.132, 0.031, labels=5000)], 0.01)
    assert verdict.sentence == (
        "Pre-training helped: runs/x, fine-tuned on 5,000 labelled images, reaches 63.2% against 50.0% from "
        "random weights (+13.2 points, 95% interval +10.1 to +16.3, 3 seeds, 1,000 test images); it is "
        "clearly better in every comparison."
    )
    assert "ruled out" in judge("x", [row(0, 0.004)], 0.01).sentence
    assert "did harm" in judge("x", [row(-0.1, 0.01)], 0.01).sentence
    assert judge("x", [row(0, 0.1)], 0.01).sentence.startswith("Cannot tell whether pre-training helped: x,")


def test_raw_pixels_that_are_ahead_are_said_to_be():
    wins = [row(0.1, 0.02), row(0.1, 0.02, "linear", pixels=0.1)]
    sentence = judge("x", [*wins, row(0.1, 0.02, "knn", pixels=-0.1)], 0.01).sentence
    assert sentence.endswith(
        "in 2 of 3 comparisons, and behind random weights in none, though raw pixels are ahead in 1."
    )


def test_one_seed_is_said_to_be_one():
    for mean in (0.1, 0.005):
        sentence = judge("x", [row(mean, 0.02, seeds=1)], 0.01).sentence
        assert "1 seed," in sentence
        assert "one seed" in sentence


def test_every_sentence_is_one_line_and_ends():
    for cells in ([row(0.1, 0.2)], [row(0.1, 0.02), row(-0.1, 0.02, labels=7)], [row(0.0, 0.001)]):
        sentence = judge("x", cells, 0.01).sentence
        assert "\n" not in sentence
        assert sentence.endswith(".")
        assert sentence.count(". ") == 0


def test_what_is_needed_would_decide_it():
    e = replace(found(0.05, 0.08), test_variance=1e-4)
    text = needed(e, 0.01)
    count = int(text.split()[1])
    assert text == f"about {count} seeds would decide it (these were 3)"
    halves = [
        math.sqrt(quantile(n) ** 2 * e.seed_variance * 3 / n + quantile(e.images) ** 2 * e.test_variance)
        for n in (count - 1, count)
    ]
    assert halves[1] < 0.05 <= halves[0]


def test_too_few_test_images_are_told_from_too_few_seeds():
    e = replace(found(0.02, 0.08), seed_variance=0.0)
    assert "test images" in needed(e, 0.01)
    assert "--seeds 3" in needed(found(0.02, 0.08, seeds=1), 0.01)


def test_points_have_a_sign_and_no_negative_nothing():
    assert [signed(x) for x in (0.0124, -0.0031, -0.0001, 0.0)] == ["+1.2", "−0.3", "+0.0", "+0.0"]


def test_nothing_is_judged_on_nothing():
    with pytest.raises(ValueError, match="no comparison"):
        judge("x", [], 0.01)
    with pytest.raises(ValueError, match="test images"):
        estimate(np.zeros((2, 1)))
