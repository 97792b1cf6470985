"""The pictures that people look at."""

import numpy as np
import pytest
import torch
from PIL import Image

from quarterview.evaluate.panel import draw_curve, draw_panel
from quarterview.model.mae import create_model


def panel_model(**options):
    torch.manual_seed(0)
    small = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "image_size": 16}
    return create_model("mae_vit_32x2x2_patch4", **{**small, **options}).eval()


def size(path):
    with Image.open(path) as image:
        return image.size


def coloured_cells(path, colour):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    return (np.abs(pixels - np.array(colour)).max(1) <= 2).mean()


def test_the_panel_shows_the_original_and_hides_what_the_mask_hides(tmp_path):
    model = panel_model()
    images = torch.zeros(3, 3, 16, 16)
    images[:, 0] = 1.0  # red
    noise = torch.rand(3, 16)
    draw_panel(model, images, noise, tmp_path / "p.png")
    red = coloured_cells(tmp_path / "p.png", (255, 0, 0))
    grey = coloured_cells(tmp_path / "p.png", (191, 191, 191))
    # The first row is red throughout, and a quarter of the second; the rest of the second is grey.
    # The third is red where visible at least.
    row = grey / 0.75
    assert 0.15 < row < 0.33
    assert red > 1.4 * row


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("shape", [(16, 16), (8, 24)])
def test_any_shape_and_number_of_channels_is_drawn(tmp_path, channels, shape):
    model = panel_model(in_chans=channels, image_size=shape)
    draw_panel(
        model, torch.rand(2, channels, *shape), torch.rand(2, model.config.patches), tmp_path / "p.png"
    )
    assert size(tmp_path / "p.png")[0] > 100


def test_the_curve_is_drawn_from_metrics(tmp_path):
    rows = [{"step": s, "loss": 1 / s, "val_loss": 1 / s if s % 2 else None} for s in range(1, 9)]
    draw_curve(rows, tmp_path / "c.png", "a run")
    assert size(tmp_path / "c.png") == (500, 300)
