import pytest
import torch
from torch import Tensor

from quarterview.model.targets import NORM_EPS, PixelTarget, patch_statistics


def truth_of(target: PixelTarget, patches: Tensor) -> Tensor:
    """The target of patches [..., P], for which whole images do not matter."""
    return target(torch.empty(0), patches, None)


@pytest.mark.parametrize("numbers", [12, 48, 768])
def test_the_normalised_target_is_the_official_formula(numbers):
    patches = 3 + 2 * torch.randn(5, 7, numbers, generator=torch.Generator().manual_seed(0))
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)  # unbiased
    expected = (patches - mean) / (variance + 1.0e-6) ** 0.5
    torch.testing.assert_close(
        truth_of(PixelTarget(numbers, normalised=True), patches), expected, rtol=1e-5, atol=1e-6
    )


def test_the_plain_target_is_the_patch():
    patches = torch.randn(2, 3, 12)
    assert torch.equal(truth_of(PixelTarget(12, normalised=False), patches), patches)


@pytest.mark.parametrize("numbers", [12, 48, 768])
def test_a_zero_prediction_scores_as_the_unbiased_variance_says(numbers):
    target = PixelTarget(numbers, normalised=True)
    patches = 5 * torch.randn(64, numbers, generator=torch.Generator().manual_seed(0))
    loss = target.loss(torch.zeros_like(patches), truth_of(target, patches))
    torch.testing.assert_close(loss, torch.full((64,), (numbers - 1) / numbers), rtol=1e-4, atol=0)


def test_a_constant_patch_has_a_finite_target_of_zero():
    truth = truth_of(PixelTarget(48, normalised=True), torch.full((1, 48), 0.7))
    assert torch.equal(truth.abs() < 1e-3, torch.ones(1, 48, dtype=torch.bool))


def test_the_epsilon_is_inside_the_root():
    patch = torch.tensor([[0.0, 2e-4]])  # variance 2e-8, below the epsilon
    expected = 1e-4 / (2e-8 + NORM_EPS) ** 0.5
    torch.testing.assert_close(
        truth_of(PixelTarget(2, normalised=True), patch), torch.tensor([[-expected, expected]])
    )


def test_the_normalisation_is_over_all_channels_of_a_patch_together():
    patch = torch.tensor([[0.0, 10.0] * 24])  # two channels, each constant
    truth = truth_of(PixelTarget(48, normalised=True), patch)
    assert truth[0, 0] < -0.9
    assert truth[0, 1] > 0.9


def test_the_loss_is_the_mean_of_squares_of_a_patch_in_float32():
    target = PixelTarget(4, normalised=False)
    pred = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]], dtype=torch.bfloat16)
    loss = target.loss(pred, torch.zeros(2, 4))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [7.5, 1.0]


def test_targets_of_half_precision_patches_are_made_in_float32():
    patches = (100 + torch.randn(3, 48, generator=torch.Generator().manual_seed(0))).to(torch.float16)
    truth = truth_of(PixelTarget(48, normalised=True), patches)
    assert truth.dtype == torch.float32
    torch.testing.assert_close(truth, truth_of(PixelTarget(48, normalised=True), patches.float()))


@pytest.mark.parametrize("normalised", [True, False])
def test_pixels_come_back_from_the_truth_and_its_statistics(normalised):
    target = PixelTarget(48, normalised)
    patches = 2 + 3 * torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    pixels = target.to_pixels(truth_of(target, patches), *patch_statistics(patches))
    torch.testing.assert_close(pixels, patches, rtol=1e-5, atol=1e-5)
