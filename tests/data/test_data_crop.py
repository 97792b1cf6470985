import math

import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from quarterview import rng
from quarterview.data.loader import resized_center_crop
from quarterview.data.transforms.crop import (
    crop_resize,
    crop_resize_batch,
    denormalize,
    draw_random_crops,
    get_center_box,
    normalize,
    to_float,
)

BICUBIC = tvf.InterpolationMode.BICUBIC
PINNED_BOXES = [
    [0, 3, 31, 23],
    [9, 13, 20, 17],
    [0, 15, 24, 29],
    [4, 21, 22, 27],
    [0, 19, 29, 29],
    [0, 0, 32, 36],
]
PINNED_FLIPS = [False, True, True, False, False, True]


def torchvision_crop(image: torch.Tensor, box: list[int], size: tuple[int, int], flip: bool) -> torch.Tensor:
    """Apply torchvision's resized crop in float, clamped to [0, 255] like its uint8 kernel."""
    crop = tvf.resized_crop(image.float(), *box, list(size), interpolation=BICUBIC, antialias=True)
    return (tvf.horizontal_flip(crop) if flip else crop).clamp(0, 255)


@st.composite
def batches(draw):
    """Draw images, a box inside each, flips, and an output size that is smaller or larger."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    count, channels = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 5]))
    boxes = []
    for _ in range(count):
        h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
        boxes.append([draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w])
    flips = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    size = (
        draw(st.integers(2, 40)),
        draw(st.integers(2, 40)),
    )  # torch is wrong for float images that are 1 pixel wide
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    images = torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    return images, boxes, flips, size


@settings(deadline=None, max_examples=80)
@given(batch=batches())
def test_the_matrix_products_are_torchvisions_resized_crop(batch):
    images, boxes, flips, size = batch
    ours = crop_resize_batch(images, torch.tensor(boxes), torch.tensor(flips), size)
    assert ours.shape == (*images.shape[:2], *size)
    for image, box, flip, mine in zip(images, boxes, flips, ours, strict=True):
        reference = torchvision_crop(image, box, size, flip)
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-3 * 255)


@settings(deadline=None, max_examples=60)
@given(batch=batches())
def test_one_image_and_a_batch_agree_within_the_rounding_of_uint8(batch):
    images, boxes, flips, size = batch
    images = images // 2 + 64  # avoids overshoot: the uint8 kernel clips after each axis
    together = crop_resize_batch(images, torch.tensor(boxes), torch.tensor(flips), size)
    for image, box, flip, row in zip(images, boxes, flips, together, strict=True):
        alone = crop_resize(image, box, size, flip)
        assert alone.dtype == torch.uint8
        assert (alone.float() - row).abs().max() <= 1.3  # 0.5 at the end, and 0.5 × 1.25 between the axes


def test_a_float_image_stays_float_and_is_torchvisions():
    image = torch.rand(3, 20, 31, generator=torch.Generator().manual_seed(0))
    ours = crop_resize(image, (2, 3, 15, 20), (8, 8), flip=True)
    assert ours.dtype == torch.float32
    assert torch.equal(
        ours, tvf.resized_crop(image, 2, 3, 15, 20, [8, 8], interpolation=BICUBIC, antialias=True).flip(2)
    )


def test_a_crop_of_the_output_size_is_not_resampled():
    images = torch.randint(0, 256, (1, 3, 30, 30), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(crop_resize(images[0], (4, 5, 16, 8), (16, 8)), images[0, :, 4:20, 5:13])
    batch = crop_resize_batch(images, torch.tensor([[4, 5, 16, 8]]), torch.tensor([False]), (16, 8))
    torch.testing.assert_close(batch[0], images[0, :, 4:20, 5:13].float(), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------- random crops


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 500), width=st.integers(1, 500), seed=st.integers(0, 10**9), epoch=st.integers(0, 9)
)
def test_boxes_lie_inside_the_image(height, width, seed, epoch):
    ids = torch.arange(40)
    boxes, flips = draw_random_crops(
        seed, torch.full_like(ids, epoch), ids, torch.tensor([[height, width]]).expand(40, 2)
    )
    top, left, h, w = boxes.unbind(1)
    assert ((h >= 1) & (w >= 1) & (top >= 0) & (left >= 0)).all()
    assert ((top + h <= height) & (left + w <= width)).all()
    assert flips.dtype == torch.bool


def test_area_aspect_and_position_are_distributed_as_in_torchvision():
    count, height, width = 20_000, 400, 500
    ids = torch.arange(count)
    boxes, flips = draw_random_crops(
        3, torch.zeros_like(ids), ids, torch.tensor([[height, width]]).expand(count, 2)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(1, height, width)
        theirs = torch.tensor(
            [
                RandomResizedCrop.get_params(image, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
                for _ in range(5_000)
            ]
        )

    def measures(boxes: torch.Tensor) -> torch.Tensor:
        top, left, h, w = boxes.double().unbind(1)
        area, aspect = h * w / (height * width), (w / h).log()
        free = ((height - h) > 5) & ((width - w) > 5)
        position = torch.stack([top / (height - h).clamp(min=1), left / (width - w).clamp(min=1)])[:, free]
        assert (area > 0.195).all()
        assert (area <= 1).all()
        assert (aspect.abs() < math.log(4 / 3) + 0.02).all()
        quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        parts = [area, aspect, *position]
        return torch.stack([torch.cat([x.mean()[None], x.std()[None], x.quantile(quantiles)]) for x in parts])

    torch.testing.assert_close(measures(boxes), measures(theirs), rtol=0, atol=0.025)
    assert abs(flips.double().mean() - 0.5) < 0.015
    assert abs(torch.corrcoef(torch.stack([flips.double(), boxes[:, 1].double()]))[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 1000, [0, 493, 10, 13]), (1000, 10, [493, 0, 13, 10])]
)
def test_a_very_long_image_gets_the_center_crop_as_in_torchvision(height, width, box):
    ids = torch.arange(20)
    boxes, _ = draw_random_crops(0, torch.zeros_like(ids), ids, torch.tensor([[height, width]]).expand(20, 2))
    assert boxes.tolist() == [box] * 20
    theirs = RandomResizedCrop.get_params(torch.empty(1, height, width), (0.2, 1.0), (3 / 4, 4 / 3))
    assert list(theirs) == box


def test_a_sample_keeps_its_crop_in_any_batch():
    ids, epochs = torch.arange(100), torch.arange(100) % 3
    sizes = torch.stack([50 + ids, 90 - ids // 2], dim=1)
    boxes, flips = draw_random_crops(7, epochs, ids, sizes)
    some = torch.tensor([41, 3, 99, 0])
    again = draw_random_crops(7, epochs[some], ids[some], sizes[some])
    assert torch.equal(again[0], boxes[some])
    assert torch.equal(again[1], flips[some])
    for other in (draw_random_crops(8, epochs, ids, sizes), draw_random_crops(7, epochs + 1, ids, sizes)):
        assert (other[0] != boxes).any(dim=1).float().mean() > 0.9
        assert 0.3 < (other[1] != flips).float().mean() < 0.7


def official_probe_box(height, width, scale, ratio, u):
    """Compute the crop of the official linear probe from four uniform numbers."""
    area = height * width * (scale[0] + u[0] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + u[1] * (high - low))
    w, h = min(round(math.sqrt(area * aspect)), width), min(round(math.sqrt(area / aspect)), height)
    return [int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (100, 30), (375, 500)])
def test_a_single_draw_is_clamped_to_the_image_as_in_the_official_probe(height, width):
    ids, scale, ratio = torch.arange(500), (0.08, 1.0), (3 / 4, 4 / 3)
    sizes = torch.tensor([[height, width]]).expand(500, 2)
    boxes, flips = draw_random_crops(5, 0 * ids, ids, sizes, scale, ratio, single_draw=True, purpose="probe")
    u = rng.uniform(5, "probe", 0 * ids, ids, 5).double()
    expected = [official_probe_box(height, width, scale, ratio, row) for row in u[:, :4].tolist()]
    assert boxes.tolist() == expected
    assert torch.equal(flips, u[:, 4] < 0.5)
    whole = (boxes[:, 2] == height) | (boxes[:, 3] == width)
    assert whole.any()  # some were clamped
    areas = (boxes[:, 2] * boxes[:, 3]).double() / (height * width)
    assert areas.min() < 0.12


def test_scale_and_ratio_bound_the_boxes():
    ids = torch.arange(2000)
    sizes = torch.tensor([[300, 300]]).expand(2000, 2)
    boxes, _ = draw_random_crops(0, 0 * ids, ids, sizes, scale=(0.08, 0.1), ratio=(1.9, 2.0))
    h, w = boxes[:, 2].double(), boxes[:, 3].double()
    assert ((h * w / 90_000 > 0.078) & (h * w / 90_000 < 0.102)).all()
    assert ((w / h > 1.85) & (w / h < 2.05)).all()
    long = torch.tensor([[10, 1000]]).expand(2000, 2)
    boxes, _ = draw_random_crops(0, 0 * ids, ids, long, scale=(0.9, 1.0), ratio=(1.9, 2.0))
    assert boxes.unique(dim=0).tolist() == [[0, 490, 10, 20]]


def test_the_pretraining_crops_never_change():
    ids = torch.arange(6)
    boxes, flips = draw_random_crops(0, ids % 2, ids, torch.tensor([[32, 48]]).expand(6, 2))
    assert boxes.tolist() == PINNED_BOXES
    assert flips.tolist() == PINNED_FLIPS


# ---------------------------------------------------------------------- center boxes and normalization


@pytest.mark.parametrize(
    ("height", "width", "image_size", "box"),
    [
        (32, 32, (16, 16), (0, 0, 32, 32)),
        (30, 50, (16, 16), (0, 10, 30, 30)),
        (50, 30, (16, 16), (10, 0, 30, 30)),
        (48, 48, (16, 32), (12, 0, 24, 48)),
        (1, 9, (16, 16), (0, 4, 1, 1)),
    ],
)
def test_the_center_box(height, width, image_size, box):
    assert get_center_box(height, width, image_size) == box


@settings(deadline=None, max_examples=100)
@given(sides=st.tuples(*[st.integers(1, 300)] * 4))
def test_the_center_box_is_the_largest_inside(sides):
    height, width, rows, columns = sides
    top, left, h, w = get_center_box(height, width, (rows, columns))
    assert top >= 0
    assert left >= 0
    assert top + h <= height
    assert left + w <= width
    assert h == height or w == width or min(h, w) == 1
    assert abs(2 * top + h - height) <= 1
    assert abs(2 * left + w - width) <= 1
    if min(h, w) > 1:
        assert abs(h * columns - w * rows) <= max(rows, columns)


def test_seven_eighths_of_the_box_are_the_official_resize_256_and_central_224():
    image = torch.randint(0, 256, (3, 512, 640), generator=torch.manual_seed(0), dtype=torch.uint8)
    theirs = tvf.center_crop(
        tvf.resize(image, [256], interpolation=tvf.InterpolationMode.BICUBIC, antialias=True), [224]
    )
    inner = (..., slice(2, -2), slice(2, -2))  # at the edge, the reference uses pixels outside the crop
    assert torch.equal(resized_center_crop(image, (224, 224), 224 / 256)[inner], theirs[inner])
    assert not torch.equal(resized_center_crop(image, (224, 224))[inner], theirs[inner])


def test_normalize_and_denormalize():
    generator = torch.Generator().manual_seed(0)
    images, mean, std = torch.rand(4, 3, 5, 6, generator=generator), (0.1, 0.5, 0.9), (0.2, 0.3, 0.05)
    normalised = normalize(images, mean, std)
    for channel in range(3):
        expected = (images[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(normalised[:, channel], expected)
    torch.testing.assert_close(denormalize(normalised, mean, std), images)


def test_to_float():
    assert torch.equal(to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0, 0.2, 1]))
    floats = torch.tensor([-3.0, 0.5, 1e9])
    assert torch.equal(to_float(floats), floats)
