"""RandAugment, random erasing, and their use by the loader, with labels."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from quarterview import rng
from quarterview.data.cache import load_cached_dataset
from quarterview.data.config import RANDAUGMENT, AugmentConfig
from quarterview.data.loader import Loader
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.open import open_source
from quarterview.data.sources.subset import Subset, select_subset
from quarterview.data.transforms.crop import draw_random_crops
from quarterview.data.transforms.randaugment import (
    apply_randaugment,
    apply_random_erasing,
    check_randaugment_policy,
)
from quarterview.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.25, 0.25)
PIXELS = torch.randint(0, 256, (3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_randaugment_is_timms_with_seeded_generators():
    mine = apply_randaugment(PIXELS, RANDAUGMENT, MEAN, 1, 2, 3)
    theirs = rand_augment_transform(
        RANDAUGMENT,
        {"translate_const": 9, "img_mean": (128, 102, 76), "interpolation": Image.Resampling.BICUBIC},
    )
    with rng.seeded(1, "randaugment", 2, 3):
        expected = theirs(Image.fromarray(PIXELS.permute(1, 2, 0).numpy()))
    assert np.array_equal(mine.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_randaugment_differs_by_sample_and_epoch_and_leaves_the_generators_alone():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    made = {
        apply_randaugment(PIXELS, RANDAUGMENT, MEAN, 0, e, i).numpy().tobytes()
        for e in (0, 1)
        for i in range(8)
    }
    assert len(made) > 10
    assert states[0] == random.getstate()
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert torch.equal(states[2], torch.get_rng_state())


def test_randaugment_needs_8_bit_rgb_images():
    for pixels in (PIXELS[:1], PIXELS.float()):
        with pytest.raises(UserError, match="8-bit RGB"):
            apply_randaugment(pixels, RANDAUGMENT, MEAN, 0, 0, 0)


def test_random_erasing_fills_one_rectangle_with_noise_with_the_given_probability():
    images, ids = torch.full((4000, 3, 16, 16), 9.0), torch.arange(4000)
    made = apply_random_erasing(images, 0.25, 0, ids * 0, ids)
    erased = (made != 9).any(1)  # [B, H, W]
    is_erased = erased.flatten(1).any(1)
    assert 0.23 < is_erased.float().mean() < 0.27
    areas = erased[is_erased].flatten(1).float().mean(1)
    assert areas.min() >= 0.01
    assert areas.max() <= 0.36
    for one in erased[is_erased][:200]:
        assert torch.equal(one, one.any(1)[:, None] & one.any(0))
    noise = made[made != 9]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_random_erasing_depends_only_on_the_sample():
    images, ids = torch.randn(32, 3, 16, 16), torch.arange(32)
    whole = apply_random_erasing(images, 0.5, 3, ids % 2, ids)
    assert torch.equal(whole[10:20], apply_random_erasing(images[10:20], 0.5, 3, ids[10:20] % 2, ids[10:20]))
    assert torch.equal(apply_random_erasing(images, 0.0, 3, ids, ids), images)


def loader(source, augment, cached=False, labels=None, workers=0):
    stream = SampleStream(len(source), 0, 5)
    cache = load_cached_dataset(source, torch.device("cpu"), 1 << 30, 1, lambda _: None) if cached else None
    return Loader(
        source,
        stream,
        (16, 16),
        MEAN,
        STD,
        torch.device("cpu"),
        workers,
        cache,
        lambda _: None,
        augment,
        labels,
    )


@pytest.mark.parametrize("cached", [False, True])
def test_labels_are_those_of_the_loaded_images(tmp_path, cached):
    """The label of a replacement is that of the replacement, not of the broken sample."""
    for i in range(12):
        folder = tmp_path / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (20 * (i % 3 + 1),) * 3).save(folder / f"{i}.png")
    (tmp_path / "class1" / "4.png").write_bytes(b"broken")
    source = open_source(str(tmp_path), 3)
    labels = torch.tensor([source.label(i) for i in range(12)])
    plain = AugmentConfig(crop_min=0.5, randaugment=None, erase_prob=0.0)
    made = loader(source, plain, cached, labels)
    loaded, replaced = [], 0
    for batch in made.iter_batches([range(s, s + 6) for s in range(0, 48, 6)]):
        values = batch.images[:, 0, 0, 0] * STD[0] + MEAN[0]
        assert torch.equal((values * 255 / 20).round().long() - 1, batch.labels)
        loaded += batch.labels.tolist()
        replaced += int((labels[batch.ids] != batch.labels).sum())
    assert len(loaded) == 48
    assert replaced > 0


def test_batches_with_randaugment_do_not_depend_on_the_number_of_workers():
    source = open_source("shapes:24:size=20", 3)
    labels = torch.tensor([source.label(i) for i in range(24)])
    parts = [range(s, s + 8) for s in range(0, 32, 8)]
    one, two = (list(loader(source, AugmentConfig(), False, labels, w).iter_batches(parts)) for w in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_scale_bounds_the_area_of_crops():
    sizes, ids = torch.tensor([[64, 64]]).expand(50, 2), torch.arange(50)
    min_areas = [
        float(
            (
                draw_random_crops(0, ids * 0, ids, sizes, scale=(min_scale, 1.0))[0][:, 2:].prod(1) / 64**2
            ).min()
        )
        for min_scale in (0.08, 1.0)
    ]
    assert min_areas[0] < 0.2
    assert min_areas[1] > 0.7  # only the aspect ratio reduces the area


def test_a_subset_is_a_source():
    source = open_source("shapes:20:size=16", 3)
    part = select_subset(source, [7, 3, 11])
    assert len(part) == 3
    assert torch.equal(part.image(1).pixels, source.image(3).pixels)
    assert torch.equal(part.images(torch.tensor([2, 0]))[1], source.image(7).pixels)
    assert part.label(2) == source.label(11)
    assert part.name(0) == source.name(7)
    assert part.fingerprint() != select_subset(source, [7, 3, 12]).fingerprint() != source.fingerprint()
    assert select_subset(source, range(20)) is source
    assert isinstance(part, Subset)


@pytest.mark.parametrize(("name", "wrong"), [("erase_prob", 1.5), ("crop_min", 0.0)])
def test_invalid_values_are_rejected(name, wrong):
    with pytest.raises(
        UserError, match=rf"^--{name.replace('_', '-')} {wrong} is out of range\. Give a number"
    ):
        AugmentConfig(**{name: wrong})


@pytest.mark.parametrize("policy", ["rand-m-q5", "auto"])
def test_invalid_policies_are_rejected(policy):
    with pytest.raises(
        UserError, match=rf"--randaugment is {policy}\. Give a policy of timm, such as rand-m9"
    ):
        check_randaugment_policy(policy)


def test_none_disables_randaugment():
    assert AugmentConfig(randaugment="none").randaugment is None
    assert AugmentConfig().randaugment == RANDAUGMENT
    check_randaugment_policy(RANDAUGMENT)
