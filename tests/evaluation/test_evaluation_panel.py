"""Reconstruction panels, image grids and loss curves."""

import numpy as np
import pytest
import torch
from PIL import Image

from quarterview.errors import UserError
from quarterview.evaluation.panel import (
    draw_image_grid,
    draw_loss_curve,
    draw_panel,
    make_reconstruction_rows,
    read_images,
    to_display_range,
)
from quarterview.models.create import create_model


def panel_model(**options):
    torch.manual_seed(0)
    small = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "image_size": 16}
    return create_model("mae_vit_32x2x2_patch4", **{**small, **options}).eval()


def size(path):
    with Image.open(path) as image:
        return image.size


def fraction_of_color(path, color):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    return (np.abs(pixels - np.array(color)).max(1) <= 2).mean()


def test_the_panel_shows_the_original_and_the_mask(tmp_path):
    model = panel_model()
    images = torch.zeros(3, 3, 16, 16)
    images[:, 0] = 1.0  # red
    noise = torch.rand(3, 16)
    draw_panel(model, images, noise, tmp_path / "p.png")
    red = fraction_of_color(tmp_path / "p.png", (255, 0, 0))
    gray = fraction_of_color(tmp_path / "p.png", (191, 191, 191))
    # The first row is red. A quarter of the second row is red, and the rest is gray. The third row is red
    # where patches are visible.
    row = gray / 0.75
    assert 0.15 < row < 0.33
    assert red > 1.4 * row


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("shape", [(16, 16), (8, 24)])
def test_any_shape_and_number_of_channels_is_drawn(tmp_path, channels, shape):
    model = panel_model(in_chans=channels, image_size=shape)
    draw_panel(
        model, torch.rand(2, channels, *shape), torch.rand(2, model.config.num_patches), tmp_path / "p.png"
    )
    assert size(tmp_path / "p.png")[0] > 100


def test_the_loss_curve_is_drawn_from_metrics(tmp_path):
    rows = [{"step": s, "loss": 1 / s, "val_loss": 1 / s if s % 2 else None} for s in range(1, 9)]
    draw_loss_curve(rows, tmp_path / "c.png", "a run")
    assert size(tmp_path / "c.png") == (500, 300)


def test_images_are_read_from_files_and_data_sets(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.PNG")
    np.save(tmp_path / "many.npy", pixels[None].repeat(20, 0))
    specs = [str(tmp_path / "a.PNG"), str(tmp_path / "many.npy")]
    images = read_images(specs, 3, (16, 16))
    assert images.shape == (8, 3, 16, 16)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    torch.testing.assert_close(images, expected.expand(8, -1, -1, -1), atol=1e-6, rtol=0)
    assert len(read_images(specs, 3, (16, 16), max_images=2)) == 2
    assert read_images(specs[:1], 3, (8, 4)).shape == (1, 3, 8, 4)
    with pytest.raises(UserError, match="No images are given"):
        read_images([], 3, (16, 16))
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"Cannot read .*b\.png"):
        read_images([str(tmp_path / "b.png")], 3, (16, 16))


def test_visible_patches_are_unchanged_in_reconstructions():
    model = panel_model(mean=(0.5,) * 3, std=(0.25,) * 3)
    images, noise = torch.randn(3, 3, 16, 16).clamp(-2, 2), torch.rand(3, 16)
    rows = make_reconstruction_rows(model, images, noise)
    assert list(rows) == ["visible (25%)", "reconstruction"]
    visible, reconstruction = rows.values()
    mask = model.unpatchify(model(images, noise=noise).mask[:, :, None].expand(-1, -1, 48).float()).bool()
    original = to_display_range(images, model.config.mean, model.config.std)
    torch.testing.assert_close(original, images * 0.25 + 0.5, atol=1e-6, rtol=0)
    assert (visible[mask] == 0.75).all()
    torch.testing.assert_close(visible[~mask], original[~mask], atol=1e-6, rtol=0)
    torch.testing.assert_close(reconstruction[~mask], original[~mask], atol=1e-6, rtol=0)


def test_rows_of_different_resolutions_are_drawn_at_the_same_size(tmp_path):
    rows = {"coarse": torch.zeros(2, 3, 4, 4), "fine": torch.zeros(2, 1, 64, 64)}
    draw_image_grid(rows, "one\ntwo", tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        black = np.asarray(image.convert("L")) < 5
    upper, lower = np.array_split(black[:240], 2)
    assert upper.any(0).sum() == pytest.approx(lower.any(0).sum(), abs=4)
    assert black[:240].mean() > 0.5
