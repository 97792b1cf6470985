"""Tests of the HOG target: comparison with scikit-image, invariances, and use in the model."""

import pytest
import torch
from skimage.feature import hog
from torch import Tensor

import quarterview as qv
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import normalize
from quarterview.errors import UserError
from quarterview.models.config import compute_hog_cell_size, compute_hog_dim
from quarterview.models.hog import compute_hog
from quarterview.models.targets import HOGTarget

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SMALL = {"image_size": 32, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def some_images(count: int = 2, channels: int = 3, height: int = 32, width: int = 48) -> Tensor:
    """Random float64 images in [0, 1], quantised to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator).double() / 255


def truth_of(images: Tensor, patch: int = 16) -> Tensor:
    """The HOG target of all patches of images in [0, 1]."""
    return HOGTarget(patch, images.shape[1])(images, torch.empty(0), None)


# ---------------------------------------------------------------------- against scikit-image


@pytest.mark.parametrize(("cell", "orientations"), [(8, 9), (4, 9), (8, 10), (16, 18), (2, 9)])
def test_histograms_equal_scikit_images(cell, orientations):
    images = some_images()
    output = compute_hog(images, cell, orientations)
    assert output.shape == (2, 3, orientations, 32 // cell, 48 // cell)
    sizes = {"pixels_per_cell": (cell, cell), "cells_per_block": (1, 1)}
    for image, histograms in zip(images.flatten(0, 1), output.flatten(0, 1), strict=True):
        theirs = hog(image.numpy(), orientations, **sizes, block_norm="L2", feature_vector=False)
        torch.testing.assert_close(
            histograms.permute(1, 2, 0), torch.tensor(theirs)[:, :, 0, 0], rtol=1e-6, atol=1e-6
        )


def test_the_target_has_scikit_images_values_in_the_order_patch_cell_channel():
    images = some_images()
    truth = HOGTarget(16, 3)(normalize(images, MEAN, STD).float(), torch.empty(0), None)
    assert truth.shape == (2, 6, 2 * 2 * 3 * 9)
    assert truth.dtype == torch.float32
    sizes = {"pixels_per_cell": (8, 8), "cells_per_block": (1, 1)}
    for i in range(2):
        for channel in range(3):
            image = images[i, channel].numpy()
            theirs = torch.tensor(hog(image, 9, **sizes, block_norm="L2", feature_vector=False))[:, :, 0, 0]
            for patch in range(6):
                row, column = 2 * (patch // 3), 2 * (patch % 3)
                torch.testing.assert_close(
                    truth[i, patch].view(2, 2, 3, 9)[:, :, channel],
                    theirs[row : row + 2, column : column + 2].float(),
                    rtol=1e-4,
                    atol=1e-5,
                )


# ---------------------------------------------------------------------- invariances


def test_brightness_and_contrast_make_no_difference():
    images = some_images() / 2
    for changed in (images + 0.3, 1.7 * images, 0.1 * images):
        torch.testing.assert_close(truth_of(changed), truth_of(images), rtol=1e-4, atol=1e-4)


def test_rotation_by_90_degrees_shifts_the_bins_by_half():
    images = some_images(height=32, width=32)
    images = images + 1e-3 * torch.rand(
        images.shape, dtype=torch.float64
    )  # no gradient exactly on the edge of a bin
    output = compute_hog(images, 8, 18)
    turned = compute_hog(images.rot90(1, (2, 3)), 8, 18)
    torch.testing.assert_close(turned, output.rot90(1, (3, 4)).roll(9, dims=2))
    opposite = compute_hog(images.rot90(2, (2, 3)), 8)  # rotation by 180° works for any number of bins
    torch.testing.assert_close(opposite, compute_hog(images, 8).rot90(2, (3, 4)))


def test_mirroring_reverses_the_bins():
    images = some_images(height=40, width=40)
    images = images + 1e-3 * torch.rand(images.shape, dtype=torch.float64)
    output, mirrored = (compute_hog(some, 8) for some in (images, images.flip(3)))
    inner = (slice(None), slice(None), slice(None), slice(1, -1), slice(1, -1))  # the border has angles of 0
    torch.testing.assert_close(mirrored.flip(4)[inner], output.flip(2)[inner])


@pytest.mark.parametrize(("degrees", "expected"), [(0, 0), (30, 1), (90, 4), (135, 6), (170, 8), (205, 1)])
def test_a_ramp_falls_into_the_bin_of_its_direction(degrees, expected):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = (rows * angle.sin() + columns * angle.cos())[None, None] / 100
    if degrees == 0:
        ramp = columns[None, None].double() / 100
    histogram = compute_hog(ramp, 8)[0, 0, :, 1, 1]  # away from the border
    assert histogram.argmax() == expected
    assert histogram[expected] > 0.99


def test_flat_images_have_zero_histograms_despite_rounding():
    assert torch.equal(truth_of(torch.full((1, 3, 16, 16), 0.7)), torch.zeros(1, 1, 108))
    rounded = 0.7 + 1e-7 * torch.rand(1, 3, 16, 16)
    assert truth_of(rounded).abs().max() < 0.05
    faint = torch.full((1, 3, 16, 16), 0.7)
    faint[:, :, 4, 4] += 1 / 255  # one step of one pixel
    assert truth_of(faint).view(2, 2, 3, 9)[0, 0].norm(dim=1).min() > 0.99


def test_gradients_at_the_edge_include_the_next_patch():
    images = torch.zeros(1, 1, 8, 16)
    images[..., 8:] = 1  # an edge between two flat patches
    assert truth_of(images, patch=8)[0, :, 0].tolist() == pytest.approx([1.0, 1.0])


# ---------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("patch", "cell"),
    [
        (1, 1),
        (2, 2),
        (4, 4),
        (6, 6),
        (8, 8),
        (10, 10),
        (12, 6),
        (13, 13),
        (14, 7),
        (16, 8),
        (20, 10),
        (32, 8),
    ],
)
def test_cells_fit_patches(patch, cell):
    assert compute_hog_cell_size(patch) == cell
    assert compute_hog_cell_size(999_999_937) == 999_999_937  # a large prime is fast too
    model = qv.create_model(f"mae_vit_16x1x2_patch{patch}", **SMALL | {"image_size": 2 * patch}, target="hog")
    out = model(torch.rand(2, 3, 2 * patch, 2 * patch))
    assert out.pred.shape[2] == model.config.target_dim == compute_hog_dim(patch, 3)
    assert compute_hog_dim(patch, 3) == 27 * (patch // cell) ** 2
    assert out.loss.isfinite()


@pytest.mark.parametrize("size", [(1, 8), (8, 1), (2, 2), (2, 8)])
def test_thin_images_have_a_finite_target(size):
    assert compute_hog(torch.rand(1, 1, *size), 1).isfinite().all()


# ---------------------------------------------------------------------- in the model


def test_the_loss_is_that_of_the_masked_patches_in_float32():
    torch.manual_seed(0)
    model = qv.create_model("mae_vit_16x2x2_patch8", **SMALL, target="hog", mean=MEAN, std=STD)
    images = torch.randn(3, 3, 32, 32)
    out = model(images)
    truth = model.target(images, model.patchify(images), None)
    rows = [truth[i, masked] for i, masked in enumerate(out.pred_indices)]
    assert torch.equal(out.pred_indices.sort(1).values, out.mask.nonzero()[:, 1].view(3, 12))
    torch.testing.assert_close(out.loss, (out.pred - torch.stack(rows)).square().mean())
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, mask=out.mask)
    assert (half.pred.dtype, half.loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(half.loss, out.loss, rtol=0.02, atol=0)


@pytest.mark.parametrize("options", [{}, {"decoder": "cross", "predict_ratio": 0.5}, {"predict_all": True}])
def test_several_masks_and_all_decoders_work(options):
    torch.manual_seed(0)
    model = qv.create_model("mae_vit_16x2x2_patch8", **SMALL, target="hog", **options)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 3, 16)
    both = model(images, noise=noise)
    apart = [model(images, noise=noise[:, i]).loss for i in range(3)]
    torch.testing.assert_close(both.loss, sum(apart) / 3)
    both.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_patches_of_one_pixel_work_and_reconstruct_is_an_error():
    model = qv.create_model("mae_vit_16x2x2_patch8", **SMALL, target="hog")
    assert not model.config.can_reconstruct
    assert not model.config.normalizes_patches
    assert model.config.norm_pix_loss
    assert not any(name.startswith("target") for name in model.state_dict())
    with pytest.raises(
        UserError, match="Reconstruction is not supported with a model that predicts oriented gradients"
    ):
        model.reconstruct(torch.rand(1, 3, 32, 32))
    qv.create_model("mae_vit_16x1x2_patch1", **SMALL | {"image_size": 4}, in_chans=1, target="hog")


@pytest.mark.slow
def test_gradients_are_learned(tmp_path):
    """The model memorises 32 images; learning the gradients of unseen images takes longer."""
    small = {"model": "mae_vit_64x2x2_patch8", "image_size": 32, "precision": "fp32", "device": "cpu"}
    small |= {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2, "lr": 3e-3, "mask_ratio": 0.5}
    small |= {"data": ("shapes:32:size=32",), "batch_size": 32, "holdout": 0, "crop": "none", "workers": 0}
    run = qv.pretrain(qv.PretrainConfig.from_flags(**small, target="hog", steps=600, out=str(tmp_path)))
    model, source = qv.load(tmp_path), open_source("shapes:32:size=32", 3)
    images = torch.stack([source.image(i).pixels for i in range(32)]) / 255
    images = normalize(images, model.config.mean, model.config.std)
    truth = model.target(images, model.patchify(images), None)
    constant = model.target.loss(truth.mean((0, 1)).expand_as(truth), truth).mean()
    assert run.metrics["loss"] < 0.7 * float(constant)
