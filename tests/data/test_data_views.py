"""Views of images: crop boxes, color distortion against torchvision, and pairs of views from the loader."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from quarterview import rng
from quarterview.data.cache import CachedDataset, load_cached_dataset
from quarterview.data.config import BYOL_COLORS, SIMCLR_COLORS, ColorDistortion, View, ViewConfig
from quarterview.data.loader import Loader
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import draw_random_crops, get_center_box
from quarterview.data.transforms.views import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    distort_colors,
    draw_view_crops,
    gaussian_blur,
)
from quarterview.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def images():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 9, 11)
    images[0] = 0.25  # gray
    images[1, 1:] = 0.0  # only red
    images[2] = 1.0
    return images


def numbers(count):
    return torch.arange(count), torch.zeros(count, dtype=torch.int64)


# ---------------------------------------------------------------------- colors


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (adjust_brightness, tv.adjust_brightness, torch.linspace(0, 1.9, 8)),
        (adjust_contrast, tv.adjust_contrast, torch.linspace(0, 1.9, 8)),
        (adjust_saturation, tv.adjust_saturation, torch.linspace(0, 1.9, 8)),
        (adjust_hue, tv.adjust_hue, torch.linspace(-0.5, 0.5, 8)),
    ],
)
def test_each_adjustment_is_that_of_torchvision(images, ours, theirs, factors):
    changed = ours(images, factors.view(-1, 1, 1, 1))
    for image, factor, mine in zip(images, factors, changed, strict=True):
        torch.testing.assert_close(mine, theirs(image, float(factor)), rtol=1e-4, atol=2e-5)


def test_a_blur_is_a_gaussian_away_from_the_edges():
    torch.manual_seed(0)
    images, sigma = torch.rand(3, 3, 40, 44), torch.tensor([0.1, 1.0, 2.0])
    for image, deviation, mine in zip(images, sigma, gaussian_blur(images, sigma), strict=True):
        theirs = tv.gaussian_blur(image, [25, 25], [float(deviation)] * 2)
        torch.testing.assert_close(mine[:, 12:-12, 12:-12], theirs[:, 12:-12, 12:-12], rtol=1e-4, atol=1e-5)
    flat = torch.full((3, 3, 8, 8), 0.3)
    torch.testing.assert_close(gaussian_blur(flat, sigma), flat)


def test_default_distortion_changes_nothing(images):
    ids, epochs = numbers(8)
    torch.testing.assert_close(distort_colors(images, ColorDistortion(), 0, 0, epochs, ids), images)


def test_probabilities_are_per_image():
    ids, epochs = numbers(4000)
    images = torch.rand(4000, 3, 2, 2)
    jittered = distort_colors(images, ColorDistortion((0.4, 0.4, 0.2, 0.1)), 0, 0, epochs, ids)
    assert abs(float((jittered != images).flatten(1).any(1).float().mean()) - 0.8) < 0.03
    gray = distort_colors(images, ColorDistortion(gray_prob=0.2), 0, 0, epochs, ids)
    assert abs(float((gray[:, 0] == gray[:, 1]).flatten(1).all(1).float().mean()) - 0.2) < 0.03
    solar = distort_colors(images, ColorDistortion(solarize_prob=0.2), 0, 0, epochs, ids)
    changed = (solar != images).flatten(1).any(1)
    assert abs(float(changed.float().mean()) - 0.2 * (1 - 0.5**12)) < 0.03
    assert solar[changed].max() <= 0.5
    soft = distort_colors(images, ColorDistortion(blur_prob=0.1), 0, 0, epochs, ids)
    assert abs(float(((soft - images).abs() > 1e-6).flatten(1).any(1).float().mean()) - 0.1) < 0.03


@given(
    st.integers(0, 2**31),
    st.integers(0, 9),
    st.lists(st.integers(0, 10**9), min_size=2, max_size=6, unique=True),
)
def test_colours_belong_to_the_sample(seed, epoch, ids):
    ids = torch.tensor(ids)
    epochs = torch.full_like(ids, epoch)
    images = torch.rand(len(ids), 3, 6, 5, generator=torch.Generator().manual_seed(0))
    for colors in (*SIMCLR_COLORS, *BYOL_COLORS):
        together = distort_colors(images, colors, 0, seed, epochs, ids)
        assert together.min() >= 0
        assert together.max() <= 1 + 1e-6
        alone = distort_colors(images[:1], colors, 0, seed, epochs[:1], ids[:1])
        torch.testing.assert_close(alone[0], together[0], rtol=0, atol=1e-6)


def test_other_channels_than_three_change_in_brightness_and_contrast():
    ids, epochs = numbers(6)
    for channels in (1, 2, 5):
        images = torch.rand(6, channels, 4, 4)
        out = distort_colors(
            images, ColorDistortion((0.8, 0.8, 0.8, 0.2), jitter_prob=1.0, gray_prob=1.0), 0, 0, epochs, ids
        )
        assert out.shape == images.shape
        assert not torch.equal(out, images)


# ---------------------------------------------------------------------- boxes


def test_random_boxes_are_those_of_before():
    ids, epochs = numbers(50)
    sizes = torch.tensor([[30, 50]]).expand(50, 2)
    boxes, flips = draw_view_crops(View(), 0, (16, 16), 7, epochs, ids, sizes)
    expected = draw_random_crops(7, epochs, ids, sizes)
    assert torch.equal(boxes, expected[0])
    assert torch.equal(flips, expected[1])
    second, _ = draw_view_crops(View(), 1, (16, 16), 7, epochs, ids, sizes)
    assert not torch.equal(second, boxes)
    assert not draw_view_crops(View(flip=False), 0, (16, 16), 7, epochs, ids, sizes)[1].any()


@given(st.integers(8, 80), st.integers(8, 80), st.sampled_from([(16, 16), (8, 24)]))
def test_fixed_boxes_have_one_size_and_lie_anywhere_inside(height, width, image_size):
    ids, epochs = numbers(200)
    sizes = torch.tensor([[height, width]]).expand(200, 2)
    boxes, flips = draw_view_crops(View("fixed"), 0, image_size, 3, epochs, ids, sizes)
    _, _, h, w = get_center_box(height, width, image_size, 224 / 256)
    assert boxes[:, 2:].unique(dim=0).tolist() == [[h, w]]
    assert boxes[:, :2].min() >= 0
    for axis, room in ((0, height - h), (1, width - w)):
        assert boxes[:, axis].max() <= room
        if room < 10:
            assert boxes[:, axis].unique().tolist() == list(range(room + 1))
    assert 0.3 < float(flips.float().mean()) < 0.7


def test_no_crop_is_the_central_box_unflipped():
    ids, epochs = numbers(9)
    sizes = torch.tensor([[30, 50]]).expand(9, 2)
    boxes, flips = draw_view_crops(View("none"), 0, (16, 16), 3, epochs, ids, sizes)
    assert boxes.unique(dim=0).tolist() == [[0, 10, 30, 30]]
    assert not flips.any()


# ---------------------------------------------------------------------- the loader


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    generator = np.random.default_rng(0)
    for i in range(24):
        pixels = generator.integers(60, 190, (5, 6, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
        Image.fromarray(pixels).save(path / f"{i:02d}.png")
    (path / "07.png").write_bytes(b"no image at all")
    return path


def make(folder, views, cached=False, workers=0):
    source = open_source(str(folder), 3)
    stream = SampleStream(len(source), 0, 5)
    cache = load_cached_dataset(source, CPU, 1 << 30, 2, lambda _: None) if cached else None
    assert not cached or isinstance(cache, CachedDataset)
    half = (0.5,) * 3
    return Loader(source, stream, (16, 16), half, half, CPU, workers, cache, lambda _: None, views=views)


@pytest.mark.parametrize("colors", [None, ColorDistortion((0.4, 0.4, 0.2, 0.0))], ids=["plain", "colors"])
def test_two_views_come_from_cache_and_stream_alike(folder, colors):
    views = (View(colors=colors), View(colors=colors))
    for one, two in zip(
        make(folder, views).iter_batches([range(12), range(12, 24)]),
        make(folder, views, cached=True).iter_batches([range(12), range(12, 24)]),
        strict=True,
    ):
        for a, b in ((one.images, two.images), (one.second_view, two.second_view)):
            assert a.shape == b.shape == (12, 3, 16, 16)
            assert ((a - b) / 2 * 255).abs().max() < 4  # uint8 rounds after each axis
        assert (one.images - one.second_view).abs().max() > 0.1


def test_the_first_of_two_views_is_that_of_one(folder):
    for cached in (False, True):
        (one,) = make(folder, (), cached).iter_batches([range(12)])
        (two,) = make(folder, (View(), View()), cached).iter_batches([range(12)])
        assert one.second_view is None
        assert torch.equal(one.images, two.images)


def test_workers_make_the_same_views(folder):
    views = (View(colors=BYOL_COLORS[0]), View(colors=BYOL_COLORS[1]))
    (one,) = make(folder, views).iter_batches([range(24)])
    (two,) = make(folder, views, workers=2).iter_batches([range(24)])
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.second_view, two.second_view)


def test_views_use_independent_random_numbers():
    assert (
        rng.uniform(0, "crop", 0, torch.arange(3), 2)
        .ne(rng.uniform(0, "crop 2", 0, torch.arange(3), 2))
        .all()
    )


# ---------------------------------------------------------------------- settings


def test_the_flags_make_the_view():
    assert ViewConfig().view == View()
    assert ViewConfig(color_jitter=0.4).view.colors == ColorDistortion((0.4, 0.4, 0.4, 0.1), jitter_prob=1.0)
    assert ViewConfig(crop="fixed").view.crop == "fixed"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_min": 0.0}, "--crop-min 0.0 is out of range. Give a number above 0 and of at most 1."),
        ({"crop_min": 1.1}, "--crop-min 1.1 is out of range. Give a number above 0 and of at most 1."),
        (
            {"color_jitter": -0.1},
            "--color-jitter -0.1 is out of range. Give a number of at least 0 and of at most 2.",
        ),
        ({"crop": "big"}, "Unknown value of --crop: 'big'. Give one of: random, fixed, none."),
    ],
)
def test_invalid_views_are_rejected(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ViewConfig(**values)
