"""Mixup and CutMix against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution
from scipy.stats import kstest

from quarterview import rng
from quarterview.data.transforms.mixing import convert_uniform_to_beta, mix_pairs


def batch(count=64, side=12):
    """Return images whose pixels are all their index, one-hot targets, and ids."""
    ids = torch.arange(count)
    return ids[:, None, None, None].expand(-1, 3, side, side).float(), torch.eye(count), ids


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
def test_lambda_is_beta_distributed(alpha):
    numbers = convert_uniform_to_beta(rng.uniform(0, "x", 0, torch.arange(20_000), 1)[:, 0], alpha)
    assert kstest(numbers.numpy(), beta_distribution(alpha, alpha).cdf).pvalue > 0.01


def test_mixup_blends_neighbours_by_lambda_and_its_complement():
    images, targets, ids = batch()
    mixed, labels = mix_pairs(images, targets, ids * 0, ids, 0, mixup_alpha=0.8, cutmix_alpha=0.0)
    for i in range(0, 64, 2):
        lam = labels[i, i]
        torch.testing.assert_close(labels[i, i + 1], 1 - lam)
        torch.testing.assert_close(labels[i + 1, i + 1], lam)
        torch.testing.assert_close(mixed[i], (lam * i + (1 - lam) * (i + 1)).expand(3, 12, 12))
        torch.testing.assert_close(mixed[i + 1], (lam * (i + 1) + (1 - lam) * i).expand(3, 12, 12))


def test_cutmix_swaps_one_box_and_weights_labels_by_its_area():
    images, targets, ids = batch()
    mixed, labels = mix_pairs(images, targets, ids * 0, ids, 0, mixup_alpha=0.0, cutmix_alpha=1.0)
    weights = set()
    for i in range(0, 64, 2):
        swapped = mixed[i] != images[i]
        assert torch.equal(swapped, mixed[i + 1] != images[i + 1])
        assert (mixed[i][swapped] == i + 1).all()
        rows, columns = swapped[0].any(1), swapped[0].any(0)
        assert torch.equal(swapped[0], rows[:, None] & columns)  # a rectangle
        torch.testing.assert_close(labels[i, i + 1], swapped.float().mean())
        weights.add(round(float(labels[i, i]), 4))
    assert len(weights) > 10


def test_with_both_enabled_each_pair_uses_one_of_them():
    images, targets, ids = batch(2000, 8)
    mixed, _ = mix_pairs(images, targets, ids * 0, ids, 0, mixup_alpha=0.8, cutmix_alpha=1.0)
    is_cutmix = (mixed == mixed.round()).flatten(1).all(1)[::2]  # CutMix does not change pixel values
    assert 0.45 < is_cutmix.float().mean() < 0.55


@given(st.integers(1, 8), st.integers(0, 1000))
def test_parts_of_a_batch_are_mixed_as_in_the_whole_batch(half, seed):
    images, targets, ids = batch(16, 4)
    epochs = ids % 3
    whole = mix_pairs(images, targets, epochs, ids, seed, 0.8, 1.0)
    cuts = [slice(0, 2 * half), slice(2 * half, 16)]
    parts = [
        mix_pairs(images[c], targets[c], epochs[c], ids[c], seed, 0.8, 1.0) for c in cuts if 2 * half < 16
    ]
    if parts:
        for i in range(2):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
    assert torch.allclose(whole[1].sum(1), torch.ones(16))


def test_alpha_zero_disables_mixing():
    images, targets, ids = batch(4)
    mixed, labels = mix_pairs(images, targets, ids, ids, 0, 0.0, 0.0)
    assert mixed is images
    assert labels is targets
