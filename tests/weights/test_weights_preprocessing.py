"""A picture prepared as the exports say is the picture as we prepare it."""

import json

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from transformers import ViTImageProcessor
from weights_models import autoencoder

from quarterview.data.loader import central
from quarterview.evaluation.features import PAPER_CROP_PCT, PAPER_SIZE
from quarterview.models.config import ViTConfig
from quarterview.weights.preprocessing import for_timm, for_transformers, preprocessing_of

LEVELS = 2.5 / 255  # two kernels, each rounding to eight bits, and boxes that are cut before or after


def picture(height, width):
    """A smooth colour picture, uint8 [H, W, 3]."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(6 * rows + k) * np.cos(5 * columns - k) for k in range(3)]
    return (127.5 + 120 * np.stack(waves, axis=2)).astype(np.uint8)


def ours(pixels, config, crop_pct):
    cut = central(torch.from_numpy(pixels).permute(2, 0, 1), config.image_size, crop_pct).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return (cut - mean) / std


def config(size):
    return ViTConfig("mae_vit_32x1x2_patch8", size, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.mark.parametrize(
    ("size", "shape"), [((224, 224), (256, 256)), ((224, 224), (300, 420)), ((96, 160), (250, 300))]
)
def test_timm_prepares_pictures_as_we_do(size, shape):
    wanted = preprocessing_of(config(size))
    settings = timm.data.resolve_data_config(pretrained_cfg=for_timm(wanted))
    theirs = timm.data.create_transform(**settings)(Image.fromarray(picture(*shape)))
    expected = ours(picture(*shape), config(size), wanted.crop_pct)
    assert theirs.shape == expected.shape
    assert float((theirs - expected).abs().max()) <= 2 * LEVELS / 0.2


@pytest.mark.parametrize(("size", "shape"), [((32, 32), (80, 80)), ((96, 160), (192, 320))])
def test_transformers_prepares_pictures_of_the_model_s_shape_as_we_do(tmp_path, size, shape):
    content = for_transformers(preprocessing_of(config(size)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    theirs = processor(Image.fromarray(picture(*shape)), return_tensors="pt")["pixel_values"][0]
    expected = ours(picture(*shape), config(size), 1.0)
    assert theirs.shape == expected.shape
    assert float((theirs - expected).abs().max()) <= LEVELS / 0.2


def test_the_crop_is_the_one_that_evaluation_uses():
    assert preprocessing_of(config(PAPER_SIZE)).crop_pct == PAPER_CROP_PCT
    assert preprocessing_of(config((96, 160))).crop_pct == 1.0
    assert preprocessing_of(config(PAPER_SIZE), 0.9).crop_pct == 0.9


def test_statistics_that_nobody_recorded_change_nothing_and_are_said_to_be_unknown():
    wanted = preprocessing_of(autoencoder(mean=None, std=None).config)
    assert (wanted.mean, wanted.std, wanted.recorded) == ((0.0,) * 3, (1.0,) * 3, False)
