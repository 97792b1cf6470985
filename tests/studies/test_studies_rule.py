"""The rule that marks findings: planted effects are found, nothing is seldom taken for something."""

import numpy as np
import pytest

from quarterview.studies.rule import decide
from quarterview.studies.study import Finding

AHEAD = Finding("one is better", "one", "two", "linear")
AS_GOOD = Finding("one is as good", "one", "two", "linear", "as good")


def told(seeds: int, images: int, share: float, effect: float, noise: float, seed: int):
    """Two arms under paired seeds: bool [S, M] each; the first is ahead by `effect`, give or take `noise`."""
    generator = np.random.default_rng(seed)
    hard = generator.random(images)  # images are easy or hard for both arms
    arms = []
    for gain in (effect, 0.0):
        shares = np.clip(share + gain + noise * generator.standard_normal((seeds, 1)), 0, 1)
        # An image is told right if its difficulty, disturbed a little, is below the share.
        disturbed = 0.8 * hard + 0.2 * generator.random((seeds, images))
        limits = np.quantile(0.8 * hard[None] + 0.2 * generator.random((50, images)), shares)
        arms.append(disturbed < limits)
    return arms


def test_a_planted_effect_of_three_points_is_reproduced():
    for seed in range(20):
        outcome = decide(AHEAD, *told(5, 10_000, 0.6, 0.03, 0.004, seed))
        assert outcome.answer == "reproduced"
        assert 0.02 < outcome.difference.mean < 0.04
        turned = decide(AHEAD, *told(5, 10_000, 0.6, -0.03, 0.004, seed))
        assert turned.answer == "not reproduced"


def test_nothing_is_seldom_taken_for_something():
    answers = [decide(AHEAD, *told(3, 3000, 0.6, 0.0, 0.01, seed)).answer for seed in range(200)]
    assert answers.count("reproduced") <= 10  # 2.5% are allowed
    assert answers.count("not reproduced") <= 10


def test_one_seed_tells_nothing_and_says_so():
    outcome = decide(AHEAD, *told(1, 10_000, 0.6, 0.2, 0.0, 0))
    assert outcome.answer == "cannot tell"
    assert "--seeds 3" in outcome.sentence


def test_what_cannot_be_told_says_what_it_would_take():
    outcome = decide(AHEAD, *told(3, 10_000, 0.6, 0.01, 0.015, 3))
    assert outcome.answer == "cannot tell"
    assert "seeds would" in outcome.sentence or "test images" in outcome.sentence
    assert "95% interval" in outcome.sentence


def test_as_good_leaves_a_point():
    assert decide(AS_GOOD, *told(5, 20_000, 0.6, 0.0, 0.001, 0)).answer == "reproduced"
    assert decide(AS_GOOD, *told(5, 20_000, 0.6, 0.05, 0.001, 0)).answer == "reproduced"
    assert decide(AS_GOOD, *told(5, 20_000, 0.6, -0.03, 0.001, 0)).answer == "not reproduced"
    assert decide(AS_GOOD, *told(5, 200, 0.6, 0.0, 0.03, 0)).answer == "cannot tell"


@pytest.mark.parametrize("rule", ["ahead", "as good"])
def test_arms_that_never_differ(rule):
    right = np.random.default_rng(0).random((3, 5000)) < 0.7
    outcome = decide(Finding("same", "one", "two", "linear", rule), right, right)
    assert outcome.answer == ("reproduced" if rule == "as good" else "cannot tell")


def test_gains_are_compared_over_their_own_starts():
    large, small = told(4, 10_000, 0.5, 0.10, 0.002, 1)  # 10 points of gain
    other, start = told(4, 10_000, 0.7, 0.04, 0.002, 2)  # 4
    finding = Finding("the gain grows", "large", "other", "finetune", over=("small", "start"))
    outcome = decide(finding, large, other, (small, start))
    assert outcome.answer == "reproduced"
    assert abs(outcome.difference.mean - 0.06) < 0.015
    assert "large +" in outcome.sentence
    assert decide(AHEAD, large, other).answer == "not reproduced"
