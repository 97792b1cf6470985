import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quarterview import rng
from quarterview.data.sources.shapes import CLASSES, ShapesSource, compute_labels, render
from quarterview.errors import UserError


@settings(deadline=None, max_examples=25)
@given(ids=st.lists(st.integers(0, 10**9), min_size=1, max_size=40), size=st.sampled_from([8, 32, 33, 48]))
def test_an_image_does_not_depend_on_its_batch(ids, size):
    together = render(torch.tensor(ids), seed=5, size=size)
    assert together.shape == (len(ids), 3, size, size)
    alone = torch.cat([render(torch.tensor([i]), seed=5, size=size) for i in ids])
    assert torch.equal(together, alone)


def test_seeds_and_indices_give_different_images():
    images = torch.cat([render(torch.arange(50), seed) for seed in (0, 1)])
    assert len(images.flatten(1).unique(dim=0)) == 100


def test_labels_are_balanced():
    source = ShapesSource(40, seed=3, channels=3)
    given_labels = [source.label(i) for i in range(40)]
    assert given_labels == compute_labels(torch.arange(40), 3).tolist()
    for start in range(0, 40, 10):
        assert sorted(given_labels[start : start + 10]) == list(range(10))
    assert len({tuple(given_labels[start : start + 10]) for start in range(0, 40, 10)}) > 1
    assert source.classes == CLASSES


def test_discs_contrast_with_the_background():
    ids = torch.arange(1000)
    discs = ids[compute_labels(ids, 0) == CLASSES.index("disc")]
    gray = ShapesSource(1000, seed=0, channels=1, size=64).images(discs)[:, 0] / 255
    uniforms = rng.uniform(0, "shapes/place", 0, discs, 5)[:, :, None, None]
    radius = 0.32 + 0.1 * uniforms[:, 0]
    center_x, center_y = (radius + (1 - 2 * radius) * uniforms[:, i] for i in (1, 2))
    pixel = (torch.arange(64) + 0.5) / 64
    distance = torch.hypot(pixel - center_x, pixel[:, None] - center_y) / radius
    inside, outside = distance < 0.8, (distance > 1.0) & (distance < 1.3)
    inner, outer = ((gray * part).sum((1, 2)) / part.sum((1, 2)) for part in (inside, outside))
    contrast = (inner - outer).abs()
    assert contrast.mean() > 0.3
    assert contrast.quantile(0.02) > 0.1


def test_scene_does_not_depend_on_the_size():
    small, large = (render(torch.arange(20), 0, size).float() for size in (32, 128))
    reduced = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - reduced).abs().mean() < 2.0


def test_bulk_and_single_images_agree():
    source = ShapesSource(30, seed=1, channels=3, size=24)
    bulk = source.images([29, 0, 7])
    assert torch.equal(bulk, torch.stack([source.image(i).pixels for i in (29, 0, 7)]))
    assert source.images([]).shape == (0, 3, 24, 24)


def test_one_channel_is_the_luminance():
    rgb = ShapesSource(10, seed=0, channels=3).images(range(10)).double()
    gray = ShapesSource(10, seed=0, channels=1).images(range(10))
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    assert gray.shape == (10, 1, 32, 32)
    assert ((rgb * weights).sum(1) - gray[:, 0]).abs().max() <= 0.501


def test_invalid_arguments_are_refused():
    for count, channels, size in [(10, 2, 32), (0, 3, 32), (10, 3, 4)]:
        with pytest.raises(UserError, match="Give"):
            ShapesSource(count, 0, channels, size)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            ShapesSource(10, 0, 3).image(index)


def test_fingerprint_depends_on_every_argument():
    sets = [
        ShapesSource(10, 0, 3),
        ShapesSource(11, 0, 3),
        ShapesSource(10, 1, 3),
        ShapesSource(10, 0, 3, 64),
    ]
    assert len({source.fingerprint() for source in sets}) == 4
    assert sets[0].fingerprint() == ShapesSource(10, 0, 3).fingerprint()


def test_two_thousand_images_take_less_than_five_seconds():
    start = time.process_time()
    render(torch.arange(2000), seed=0)
    assert time.process_time() - start < 5
