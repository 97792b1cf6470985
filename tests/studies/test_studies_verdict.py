"""Tests of the verdict: coverage of the intervals, answers and sentences."""

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
    compute_contrast,
    compute_t_quantile,
    decide_verdict,
    describe_required_data,
    estimate_mean,
    format_signed_points,
)


def make_estimate(mean, half, seeds=3, images=1000):
    """Make an estimate of a half width; seeds and test images each contribute half of its square."""
    variance = half**2 / 2
    return Estimate(
        mean,
        mean - half,
        mean + half,
        (mean,) * seeds,
        variance / compute_t_quantile(seeds) ** 2 if seeds > 1 else 0.0,
        variance / compute_t_quantile(images) ** 2,
        images,
    )


def make_comparison(mean, half, protocol="finetune", labels=100, pixels=None, **options):
    contrasts = [Contrast("scratch", 0.5 + mean, 0.5, make_estimate(mean, half, **options))]
    if pixels is not None:
        contrasts.append(Contrast("raw pixels", 0.5 + mean, 0.5 + mean - pixels, make_estimate(pixels, half)))
    return Comparison(protocol, labels, tuple(contrasts))


def decide_answer(*rows, min_difference=0.01):
    return decide_verdict("mine", rows, min_difference).answer


# ---------------------------------------------------------------------- intervals


def test_with_equal_images_the_interval_is_that_of_student_over_seeds():
    by_seed = np.array([0.1, 0.3, 0.2, 0.5])
    e = estimate_mean(np.repeat(by_seed[:, None], 200_000, axis=1))
    low, high = stats.t.interval(0.95, 3, loc=by_seed.mean(), scale=stats.sem(by_seed))
    assert (e.low, e.high) == pytest.approx((low, high), abs=1e-4)
    assert e.by_seed == pytest.approx(tuple(by_seed))


def test_with_equal_seeds_the_interval_is_that_of_student_over_test_images():
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=5000)
    e = estimate_mean(np.tile(values, (3, 1)))
    low, high = stats.t.interval(0.95, 4999, loc=values.mean(), scale=stats.sem(values))
    assert (e.low, e.high) == pytest.approx((low, high), abs=1e-5)


def test_with_one_seed_the_interval_has_the_variance_over_test_images_only():
    values = (np.arange(400) % 4 == 0).astype(float)[None]
    e = estimate_mean(values)
    assert e.seed_variance == 0
    assert (e.high - e.low) / 2 == pytest.approx(stats.t.ppf(0.975, 399) * math.sqrt(76 / 399 / 400))


def test_arms_that_never_differ_have_an_interval_of_some_width():
    e = estimate_mean(np.zeros((3, 100)))
    assert e.low < 0 < e.high < 0.03


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("seed_sd", "image_sd"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.4), (0.02, 0.2)])
def test_intervals_cover_the_true_difference_in_95_percent_of_comparisons(seeds, seed_sd, image_sd):
    """The probability of a correct prediction depends on the arm, the seed and the image."""
    rng, images, repeats, true = np.random.default_rng(seeds), 200, 800, 0.06
    covered = 0
    for _ in range(repeats):
        by_seed = rng.normal(0, seed_sd, (seeds, 1))
        by_image = rng.choice([-image_sd, image_sd], (1, images))
        ours = rng.random((seeds, images)) < 0.5 + (true + by_seed + by_image) / 2
        theirs = rng.random((seeds, images)) < 0.5 - (true + by_seed + by_image) / 2
        e = compute_contrast("scratch", ours, theirs).difference
        covered += e.low <= true <= e.high
    assert covered / repeats >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / repeats)


def test_with_equal_seeds_an_interval_is_not_too_wide():
    rng = np.random.default_rng(1)
    halves = []
    for _ in range(300):
        right = np.tile(rng.random(1000) < 0.3, (3, 1)).astype(float)
        e = estimate_mean(right)
        halves.append((e.high - e.low) / 2)
    assert np.mean(halves) == pytest.approx(1.96 * math.sqrt(0.3 * 0.7 / 1000), rel=0.02)


@given(st.integers(1, 4), st.integers(2, 30), st.randoms(use_true_random=False))
def test_swapping_the_arms_of_a_contrast_changes_the_sign(seeds, images, random):
    a, b = (np.array([[random.random() < 0.5 for _ in range(images)] for _ in range(seeds)]) for _ in "ab")
    one, other = compute_contrast("b", a, b), compute_contrast("a", b, a)
    assert one.difference.mean == pytest.approx(-other.difference.mean)
    assert one.difference.low == pytest.approx(-other.difference.high)
    assert one.difference.mean == pytest.approx(one.ours - one.theirs)


# ---------------------------------------------------------------------- answers


def test_clear_gains_in_all_comparisons_helped():
    assert decide_answer(make_comparison(0.1, 0.02), make_comparison(0.05, 0.02, labels=1000)) == "helped"


def test_a_majority_of_gains_is_enough_and_half_is_not():
    assert (
        decide_answer(
            make_comparison(0.1, 0.02),
            make_comparison(0.1, 0.02, labels=200),
            make_comparison(0.0, 0.02, labels=300),
        )
        == "helped"
    )
    assert decide_answer(make_comparison(0.1, 0.02), make_comparison(0.0, 0.02, labels=300)) == "cannot tell"


def test_gains_of_features_do_not_outweigh_fine_tuning_without_gain():
    wins = [make_comparison(0.2, 0.02, "linear", n) for n in (10, 20, 30)]
    assert decide_answer(*wins) == "helped"
    assert decide_answer(*wins, make_comparison(0.0, 0.05)) == "cannot tell"


def test_one_clear_loss_excludes_helped():
    gains = [make_comparison(0.1, 0.02, labels=n) for n in (10, 20, 30)]
    assert decide_answer(*gains, make_comparison(-0.1, 0.02, labels=40)) == "cannot tell"


def test_gains_that_are_ruled_out_did_not_help():
    assert decide_answer(make_comparison(0.0, 0.004), make_comparison(-0.2, 0.01, labels=5)) == "did not help"
    assert decide_answer(make_comparison(0.0, 0.02)) == "cannot tell"
    assert decide_answer(make_comparison(0.0, 0.02), min_difference=0.05) == "did not help"


def test_features_must_beat_raw_pixels_but_losing_to_them_is_no_harm():
    beaten, equal, worse = (make_comparison(0.2, 0.02, "knn", pixels=p) for p in (0.1, 0.0, -0.1))
    assert decide_answer(beaten) == "helped"
    assert decide_answer(equal) == "cannot tell"
    assert decide_answer(worse) == "did not help"
    assert not worse.is_worse


@given(st.lists(st.tuples(st.floats(-0.5, 0.5), st.floats(0.001, 0.5)), min_size=1, max_size=9))
def test_adding_to_every_difference_never_makes_the_answer_worse(cells):
    order = ["did not help", "cannot tell", "helped"]
    before = decide_answer(*(make_comparison(m, h, labels=i + 1) for i, (m, h) in enumerate(cells)))
    after = decide_answer(*(make_comparison(m + 0.2, h, labels=i + 1) for i, (m, h) in enumerate(cells)))
    assert order.index(after) >= order.index(before)


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_without_a_difference_helped_is_answered_in_at_most_5_percent(shared):
    """Nine comparisons without a true difference, independent or strongly correlated."""
    rng, num_trials, helped = np.random.default_rng(0), 2000, 0
    half = 1.96  # of differences of standard deviation 1, whose intervals are exact
    for _ in range(num_trials):
        z = math.sqrt(shared) * rng.normal() + math.sqrt(1 - shared) * rng.normal(size=9)
        cells = [make_comparison(0.1 * float(x), 0.1 * half, labels=i + 1) for i, x in enumerate(z)]
        helped += decide_answer(*cells) == "helped"
    assert helped / num_trials <= 0.05


# ---------------------------------------------------------------------- sentences


def test_the_sentence_contains_the_answer_and_the_accuracies():
    verdict = decide_verdict("runs/x", [make_comparison(0.132, 0.031, labels=5000)], 0.01)
    assert verdict.sentence == (
        "Pre-training helped: runs/x, fine-tuned on 5,000 labelled images, reaches 63.2% against 50.0% from "
        "random weights (+13.2 points, 95% interval +10.1 to +16.3, 3 seeds, 1,000 test images); it is "
        "clearly better in every comparison."
    )
    assert "ruled out" in decide_verdict("x", [make_comparison(0, 0.004)], 0.01).sentence
    assert "did harm" in decide_verdict("x", [make_comparison(-0.1, 0.01)], 0.01).sentence
    assert decide_verdict("x", [make_comparison(0, 0.1)], 0.01).sentence.startswith(
        "Cannot tell whether pre-training helped: x,"
    )


def test_the_sentence_mentions_raw_pixels_that_are_ahead():
    wins = [make_comparison(0.1, 0.02), make_comparison(0.1, 0.02, "linear", pixels=0.1)]
    sentence = decide_verdict("x", [*wins, make_comparison(0.1, 0.02, "knn", pixels=-0.1)], 0.01).sentence
    assert sentence.endswith(
        "in 2 of 3 comparisons, and behind random weights in none, though raw pixels are ahead in 1."
    )


def test_the_sentence_mentions_that_there_is_one_seed():
    for mean in (0.1, 0.005):
        sentence = decide_verdict("x", [make_comparison(mean, 0.02, seeds=1)], 0.01).sentence
        assert "1 seed," in sentence
        assert "one seed" in sentence


def test_every_sentence_is_one_line_with_a_full_stop():
    for cells in (
        [make_comparison(0.1, 0.2)],
        [make_comparison(0.1, 0.02), make_comparison(-0.1, 0.02, labels=7)],
        [make_comparison(0.0, 0.001)],
    ):
        sentence = decide_verdict("x", cells, 0.01).sentence
        assert "\n" not in sentence
        assert sentence.endswith(".")
        assert sentence.count(". ") == 0


def test_the_required_number_of_seeds_is_the_smallest():
    e = replace(make_estimate(0.05, 0.08), test_variance=1e-4)
    text = describe_required_data(e, 0.01)
    count = int(text.split()[1])
    assert text == f"about {count} seeds would decide it (these were 3)"
    halves = [
        math.sqrt(
            compute_t_quantile(n) ** 2 * e.seed_variance * 3 / n
            + compute_t_quantile(e.images) ** 2 * e.test_variance
        )
        for n in (count - 1, count)
    ]
    assert halves[1] < 0.05 <= halves[0]


def test_too_few_test_images_are_distinguished_from_too_few_seeds():
    e = replace(make_estimate(0.02, 0.08), seed_variance=0.0)
    assert "test images" in describe_required_data(e, 0.01)
    assert "--seeds 3" in describe_required_data(make_estimate(0.02, 0.08, seeds=1), 0.01)


def test_points_have_a_sign_and_zero_is_positive():
    assert [format_signed_points(x) for x in (0.0124, -0.0031, -0.0001, 0.0)] == [
        "+1.2",
        "−0.3",
        "+0.0",
        "+0.0",
    ]


def test_a_verdict_needs_a_comparison_and_an_estimate_two_images():
    with pytest.raises(ValueError, match="at least one comparison"):
        decide_verdict("x", [], 0.01)
    with pytest.raises(ValueError, match="test images"):
        estimate_mean(np.zeros((2, 1)))
