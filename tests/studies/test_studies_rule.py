"""Tests of the rule that decides findings, on simulated predictions with known effects."""

import numpy as np
import pytest

from quarterview.studies.rule import decide_finding
from quarterview.studies.study import Finding

AHEAD = Finding("one is better", "one", "two", "linear")
AS_GOOD = Finding("one is as good", "one", "two", "linear", "as good")


def simulate_predictions(seeds: int, images: int, accuracy: float, effect: float, noise: float, seed: int):
    """Simulate correct predictions of two arms with paired seeds: bool [S, M] each.

    The first arm is ahead by `effect`, with a standard deviation of `noise` over seeds.
    """
    generator = np.random.default_rng(seed)
    difficulty = generator.random(images)  # the same for both arms
    arms = []
    for gain in (effect, 0.0):
        accuracies = np.clip(accuracy + gain + noise * generator.standard_normal((seeds, 1)), 0, 1)
        # An image is classified correctly if its difficulty plus noise is below a quantile, the accuracy.
        disturbed = 0.8 * difficulty + 0.2 * generator.random((seeds, images))
        limits = np.quantile(0.8 * difficulty[None] + 0.2 * generator.random((50, images)), accuracies)
        arms.append(disturbed < limits)
    return arms


def test_an_effect_of_three_points_is_reproduced():
    for seed in range(20):
        outcome = decide_finding(AHEAD, *simulate_predictions(5, 10_000, 0.6, 0.03, 0.004, seed))
        assert outcome.answer == "reproduced"
        assert 0.02 < outcome.difference.mean < 0.04
        reverse = decide_finding(AHEAD, *simulate_predictions(5, 10_000, 0.6, -0.03, 0.004, seed))
        assert reverse.answer == "not reproduced"


def test_without_an_effect_findings_are_rarely_reproduced():
    answers = [
        decide_finding(AHEAD, *simulate_predictions(3, 3000, 0.6, 0.0, 0.01, seed)).answer
        for seed in range(200)
    ]
    assert answers.count("reproduced") <= 10  # 2.5% are allowed
    assert answers.count("not reproduced") <= 10


def test_one_seed_cannot_tell():
    outcome = decide_finding(AHEAD, *simulate_predictions(1, 10_000, 0.6, 0.2, 0.0, 0))
    assert outcome.answer == "cannot tell"
    assert "--seeds 3" in outcome.sentence


def test_cannot_tell_names_the_required_data():
    outcome = decide_finding(AHEAD, *simulate_predictions(3, 10_000, 0.6, 0.01, 0.015, 3))
    assert outcome.answer == "cannot tell"
    assert "seeds would" in outcome.sentence or "test images" in outcome.sentence
    assert "95% interval" in outcome.sentence


def test_as_good_allows_a_margin_of_one_point():
    assert (
        decide_finding(AS_GOOD, *simulate_predictions(5, 20_000, 0.6, 0.0, 0.001, 0)).answer == "reproduced"
    )
    assert (
        decide_finding(AS_GOOD, *simulate_predictions(5, 20_000, 0.6, 0.05, 0.001, 0)).answer == "reproduced"
    )
    assert (
        decide_finding(AS_GOOD, *simulate_predictions(5, 20_000, 0.6, -0.03, 0.001, 0)).answer
        == "not reproduced"
    )
    assert decide_finding(AS_GOOD, *simulate_predictions(5, 200, 0.6, 0.0, 0.03, 0)).answer == "cannot tell"


@pytest.mark.parametrize("rule", ["ahead", "as good"])
def test_arms_that_never_differ(rule):
    right = np.random.default_rng(0).random((3, 5000)) < 0.7
    outcome = decide_finding(Finding("same", "one", "two", "linear", rule), right, right)
    assert outcome.answer == ("reproduced" if rule == "as good" else "cannot tell")


def test_gains_over_baselines_are_compared():
    large, small = simulate_predictions(4, 10_000, 0.5, 0.10, 0.002, 1)  # 10 points of gain
    other, start = simulate_predictions(4, 10_000, 0.7, 0.04, 0.002, 2)  # 4
    finding = Finding("the gain grows", "large", "other", "finetune", over=("small", "start"))
    outcome = decide_finding(finding, large, other, (small, start))
    assert outcome.answer == "reproduced"
    assert abs(outcome.difference.mean - 0.06) < 0.015
    assert "large +" in outcome.sentence
    assert decide_finding(AHEAD, large, other).answer == "not reproduced"
