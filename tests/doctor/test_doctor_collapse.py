"""Collapse measures, image statistics and history summaries, against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quarterview.data.sources.arrays import ArraySource
from quarterview.doctor.collapse import compute_effective_rank, compute_feature_statistics
from quarterview.doctor.history import compute_relative_decrease, find_spikes, summarize_history
from quarterview.evaluation.pictures import (
    compute_image_statistics,
    compute_neighbor_correlation,
    read_image_sample,
)


@given(st.integers(2, 12))
def test_effective_rank_of_identity_covariance_is_the_dimension(dimension):
    both = torch.cat(
        [torch.eye(dimension), -torch.eye(dimension)]
    )  # centered, equal variance in all directions
    assert compute_effective_rank(both) == pytest.approx(dimension)


def test_effective_rank_of_a_line_is_one_and_of_a_point_zero():
    assert compute_effective_rank(torch.randn(50, 1) * torch.randn(1, 8)) == pytest.approx(1, abs=1e-3)
    assert compute_effective_rank(torch.ones(50, 8)) == 0
    assert compute_effective_rank(torch.zeros(50, 8)) == 0


def test_effective_rank_is_the_exponential_of_the_entropy():
    features = torch.zeros(4, 2)
    features[0, 0], features[1, 0], features[2, 1], features[3, 1] = 3, -3, 1, -1  # singular values 3 : 1
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert compute_effective_rank(features) == pytest.approx(expected)


def test_statistics_of_equal_and_of_opposite_features():
    same = compute_feature_statistics(torch.ones(10, 4))
    assert (same.between_variance_ratio, same.variance, same.mean_cosine) == (0, 0, pytest.approx(1))
    opposite = compute_feature_statistics(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert (opposite.between_variance_ratio, opposite.mean_cosine) == (pytest.approx(1), pytest.approx(-1))


def test_neighbours_correlate_in_ramps_and_not_in_noise():
    ramp = torch.arange(64.0).expand(3, 64, 64)
    assert compute_neighbor_correlation(ramp) > 0.95
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert abs(compute_neighbor_correlation(noise)) < 0.05
    stripes = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 64, 64)
    assert compute_neighbor_correlation(stripes) == pytest.approx(
        0, abs=0.02
    )  # opposite across, the same down
    assert math.isnan(compute_neighbor_correlation(torch.ones(3, 8, 8)))


def test_image_statistics(tmp_path):
    some = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    other = np.full((1, 8, 8, 3), 100, np.uint8)
    np.save(tmp_path / "x.npy", np.concatenate([some, some, some, other]))
    sample = read_image_sample(ArraySource(tmp_path / "x.npy", 3), range(4), (8, 8))
    assert sample.eight_bit
    result = compute_image_statistics(sample, patch_size=4)
    assert (result.count, result.repeated, result.constant, result.flat) == (4, 0.5, 0.25, 0.25)
    np.save(tmp_path / "y.npy", np.repeat(some, 5, axis=0))
    equal = compute_image_statistics(
        read_image_sample(ArraySource(tmp_path / "y.npy", 3), range(5), (8, 8)), patch_size=4
    )
    assert equal.difference == equal.between_variance_ratio == 0
    assert equal.repeated == 0.8


def test_all_variance_of_noise_is_between_images(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), np.uint8))
    result = compute_image_statistics(
        read_image_sample(ArraySource(tmp_path / "x.npy", 3), range(200), (8, 8)), 4
    )
    assert result.between_variance_ratio == pytest.approx(1, abs=0.02)
    assert result.deviation == pytest.approx(math.sqrt((256**2 - 1) / 12) / 255, rel=0.02)


def row(step, loss, **others):
    return {
        "step": step,
        "epoch": 0.1,
        "loss": loss,
        "grad_norm": 1.0,
        "data_wait": 0.5,
        "skipped": 0,
    } | others


def test_a_history_is_summarized_after_the_warm_up():
    rows = (
        [row(1, 9.0)] + [row(i, 1.0, val_loss=v) for i, v in ((2, 0.9), (3, 0.7), (4, 0.8))] + [row(5, None)]
    )
    result = summarize_history(rows, warmup_steps=1)
    assert (result.num_rows, result.step, result.loss, result.min_loss) == (5, 5, 1.0, 1.0)
    assert (result.first_val_loss, result.min_val_loss, result.min_val_loss_step, result.last_val_loss) == (
        0.9,
        0.7,
        3,
        0.8,
    )
    assert result.data_wait == 0.5


def test_an_empty_history():
    result = summarize_history([], 10)
    assert (result.num_rows, result.step, result.loss, result.data_wait, result.spikes) == (
        0,
        0,
        None,
        None,
        (),
    )


def test_spikes_and_decreases():
    losses = [(i, 1.0) for i in range(10)]
    assert find_spikes(losses) == []
    losses[6] = (6, 3.0)
    assert find_spikes(losses) == [(6, 3.0)]
    assert compute_relative_decrease([1.0, 1.0, 0.5, 0.5]) == 0.5


def test_the_growth_of_the_gradient_is_that_of_medians():
    rows = [row(i, 1.0, grad_norm=1.0 if i < 10 else 20.0) for i in range(1, 20)]
    assert summarize_history(rows, 0).grad_norm_growth == pytest.approx(20)
