"""The preprocessing of exports gives the same images as that of this package."""

import json

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from transformers import ViTImageProcessor
from weights_models import autoencoder

from quarterview.data.loader import resized_center_crop
from quarterview.evaluation.features import PAPER_CROP_PCT, PAPER_SIZE
from quarterview.models.config import ViTConfig
from quarterview.weights.preprocessing import get_preprocessing, to_timm_cfg, to_transformers_config

TOLERANCE = 2.5 / 255  # two implementations, which round to 8 bits and crop before or after resizing


def make_image(height, width):
    """Return a smooth RGB image, uint8 [H, W, 3]."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(6 * rows + k) * np.cos(5 * columns - k) for k in range(3)]
    return (127.5 + 120 * np.stack(waves, axis=2)).astype(np.uint8)


def preprocess(pixels, config, crop_pct):
    cropped = (
        resized_center_crop(torch.from_numpy(pixels).permute(2, 0, 1), config.image_size, crop_pct).float()
        / 255
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return (cropped - mean) / std


def make_config(size):
    return ViTConfig("mae_vit_32x1x2_patch8", size, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.mark.parametrize(
    ("size", "shape"), [((224, 224), (256, 256)), ((224, 224), (300, 420)), ((96, 160), (250, 300))]
)
def test_timm_preprocesses_images_equally(size, shape):
    preprocessing = get_preprocessing(make_config(size))
    settings = timm.data.resolve_data_config(pretrained_cfg=to_timm_cfg(preprocessing))
    theirs = timm.data.create_transform(**settings)(Image.fromarray(make_image(*shape)))
    expected = preprocess(make_image(*shape), make_config(size), preprocessing.crop_pct)
    assert theirs.shape == expected.shape
    assert float((theirs - expected).abs().max()) <= 2 * TOLERANCE / 0.2


@pytest.mark.parametrize(("size", "shape"), [((32, 32), (80, 80)), ((96, 160), (192, 320))])
def test_transformers_preprocesses_images_of_the_models_aspect_ratio_equally(tmp_path, size, shape):
    content = to_transformers_config(get_preprocessing(make_config(size)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    theirs = processor(Image.fromarray(make_image(*shape)), return_tensors="pt")["pixel_values"][0]
    expected = preprocess(make_image(*shape), make_config(size), 1.0)
    assert theirs.shape == expected.shape
    assert float((theirs - expected).abs().max()) <= TOLERANCE / 0.2


def test_the_crop_fraction_is_that_of_evaluation():
    assert get_preprocessing(make_config(PAPER_SIZE)).crop_pct == PAPER_CROP_PCT
    assert get_preprocessing(make_config((96, 160))).crop_pct == 1.0
    assert get_preprocessing(make_config(PAPER_SIZE), 0.9).crop_pct == 0.9


def test_unrecorded_mean_and_std_are_0_and_1():
    preprocessing = get_preprocessing(autoencoder(mean=None, std=None).config)
    assert (preprocessing.mean, preprocessing.std, preprocessing.recorded) == ((0.0,) * 3, (1.0,) * 3, False)
