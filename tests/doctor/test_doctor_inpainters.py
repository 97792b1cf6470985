"""Trivial inpainters against cases computed by hand."""

import pytest
import torch

from quarterview.doctor.inpainters import (
    INTERPOLATED,
    MEAN,
    NEAREST,
    ZERO,
    compute_best_scale,
    compute_inpainter_losses,
    compute_model_losses,
    inpaint_interpolated,
    inpaint_mean,
    inpaint_nearest,
)
from quarterview.models import masking
from quarterview.models.create import create_model


def small(**options):
    torch.manual_seed(0)
    shape = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "image_size": 16}
    return create_model("mae_vit_32x2x2_patch4", **{**shape, "norm_pix_loss": False, **options}).eval()


def make_mask(*masked, count=16):
    mask = torch.zeros(1, count, dtype=torch.bool)
    mask[0, list(masked)] = True
    return mask


def ramp():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    return torch.stack([0.1 * rows, 0.2 * columns - 1, 0.3 * rows + 0.05 * columns])[None]


@pytest.mark.parametrize("places", [(5,), (5, 6, 9, 10), (6, 9)])
def test_a_ramp_is_interpolated_exactly_inside_the_visible_patches(places):
    model, mask = small(), make_mask(*places)
    patches = model.patchify(ramp())
    visible, hidden = masking.split_indices(mask, int((~mask).sum()))
    filled = inpaint_interpolated(patches, visible, hidden, num_columns=4, in_chans=3)
    torch.testing.assert_close(filled, patches[:, list(places)], atol=1e-5, rtol=0)
    assert float(compute_inpainter_losses(model, ramp(), mask)[INTERPOLATED]) < 1e-9


def test_outside_the_visible_pixels_the_nearest_one_is_used():
    model, mask = small(), make_mask(*range(4))  # the upper row of patches
    patches = model.patchify(ramp())
    visible, hidden = masking.split_indices(mask, 12)
    filled = inpaint_interpolated(patches, visible, hidden, num_columns=4, in_chans=3)
    image = model.unpatchify(torch.cat([filled, patches[:, 4:]], dim=1))
    torch.testing.assert_close(image[:, :, :4], ramp()[:, :, 4:5].expand(-1, -1, 4, -1), atol=1e-5, rtol=0)


def test_a_single_visible_pixel_fills_the_image():
    patches = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])  # 2×2 patches of one gray pixel
    visible, hidden = torch.tensor([[2]]), torch.tensor([[0, 1, 3]])
    assert inpaint_interpolated(patches, visible, hidden, num_columns=2, in_chans=1).flatten().tolist() == [
        3,
        3,
        3,
    ]


def test_nearest_on_two_by_two():
    patches = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    visible, hidden = torch.tensor([[0, 3]]), torch.tensor([[1, 2]])
    assert inpaint_nearest(patches, visible, hidden, num_columns=2).flatten().tolist() == [
        1,
        1,
    ]  # a tie
    visible, hidden = torch.tensor([[3]]), torch.tensor([[0, 1, 2]])
    assert inpaint_nearest(patches, visible, hidden, num_columns=2).flatten().tolist() == [4, 4, 4]
    visible, hidden = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    assert inpaint_nearest(patches, visible, hidden, num_columns=2).flatten().tolist() == [1, 2]


def test_the_mean_of_visible_patches_is_a_color():
    patches = torch.arange(24.0).view(1, 3, 8)  # three patches of four pixels of two channels
    result = inpaint_mean(patches, torch.tensor([[0, 2]]), torch.tensor([[1]]), in_chans=2)
    assert result.flatten().tolist() == [11, 12] * 4


def test_losses_of_pixels_by_hand():
    model, mask = small(), make_mask(0, 1, 2)
    images = torch.randn(1, 3, 16, 16)
    hidden = model.patchify(images)[:, :3]
    visible = model.patchify(images)[:, 3:]
    color = visible.unflatten(2, (-1, 3)).mean((1, 2))
    losses = compute_inpainter_losses(model, images, mask)
    torch.testing.assert_close(losses[ZERO], hidden.square().mean((1, 2)))
    expected = (hidden.unflatten(2, (-1, 3)) - color[:, None, None]).square().mean((1, 2, 3))
    torch.testing.assert_close(losses[MEAN], expected)


def test_zero_scores_the_closed_form_on_normalised_patches_and_no_inpainter_is_worse():
    model = small(norm_pix_loss=True)
    images = torch.randn(4, 3, 16, 16)
    mask = masking.mask_from_noise(torch.rand(4, 16), 4)
    losses = compute_inpainter_losses(model, images, mask)
    torch.testing.assert_close(losses[ZERO], torch.full((4,), 47 / 48), atol=1e-4, rtol=0)
    assert all(float(losses[name].mean()) <= float(losses[ZERO].mean()) + 1e-6 for name in losses)


def test_a_copy_is_perfect_if_all_patches_are_equal():
    model = small(norm_pix_loss=True)
    images = torch.rand(2, 3, 4, 4).repeat(1, 1, 4, 4)
    mask = masking.mask_from_noise(torch.rand(2, 16), 4)
    assert float(compute_inpainter_losses(model, images, mask)[NEAREST].max()) < 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_the_losses_of_a_model_with_predict_ratio_are_of_the_predicted_patches(training):
    model = small(decoder="cross", decoder_depth=1, predict_ratio=0.5).train(training)
    images, mask = torch.randn(40, 3, 16, 16), masking.mask_from_noise(torch.rand(40, 16), 4)
    torch.manual_seed(0)
    result = compute_model_losses(model, images, mask)
    torch.manual_seed(0)
    expected = torch.cat([model(images[i : i + 32], mask=mask[i : i + 32]).loss[None] for i in (0, 32)])
    torch.testing.assert_close(torch.stack([result[:32].mean(), result[32:].mean()]), expected)


@pytest.mark.parametrize("predict_all", [False, True])
def test_the_models_losses_average_to_its_own_loss(predict_all):
    model = small(predict_all=predict_all, norm_pix_loss=True)
    images, mask = torch.randn(40, 3, 16, 16), masking.mask_from_noise(torch.rand(40, 16), 4)
    result = compute_model_losses(model, images, mask)
    if predict_all:
        out = model(images, mask=mask)
        truth = model.target(images, model.patchify(images), None)
        expected = (out.pred - truth).square().mean(2)[mask].view(40, -1).mean(1)
        torch.testing.assert_close(result, expected)
    else:
        torch.testing.assert_close(result.mean(), model(images, mask=mask).loss)


def test_the_best_factor_is_that_of_least_squares_within_bounds():
    pred = torch.tensor([1.0, 2.0])
    assert compute_best_scale(pred, torch.tensor([0.5, 1.0])) == pytest.approx(0.5)
    assert compute_best_scale(pred, torch.tensor([3.0, 6.0])) == 1
    assert compute_best_scale(pred, torch.tensor([-3.0, -6.0])) == 0
    assert compute_best_scale(torch.zeros(2), pred) == 0
