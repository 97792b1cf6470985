"""Robustness: corruptions that are the same in any order, the mCE, other sets, and the command."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from quarterview.cli import run as run_cli
from quarterview.commands.robustness import robustness
from quarterview.data.sources.open import open_source
from quarterview.errors import UserError
from quarterview.evaluation import corruptions
from quarterview.evaluation.class_map import classes_of, read_class_map
from quarterview.evaluation.config import COMMON, EXTRA, RobustnessConfig
from quarterview.evaluation.corruptions import (
    Corruption,
    all_of,
    corrupt,
    one_of,
    predictions,
)
from quarterview.evaluation.features import class_scores, extract
from quarterview.evaluation.robustness import ALEXNET, Corrupted, set_accuracy
from quarterview.models.config import ClassifierConfig
from quarterview.models.create import fresh_classifier
from quarterview.training import checkpoint
from quarterview.training.console import Console
from quarterview.weights.loading import metadata

NAMES = ("circle", "square", "triangle", "star")
CONFIG = ClassifierConfig(
    *("mae_vit_32x2x2_patch4", (16, 16), 3, (0.5,) * 3, (0.25,) * 3), classes=4, class_names=NAMES
)


def classifier(config=CONFIG):
    """One that tells pictures apart, by random weights."""
    model = fresh_classifier(config, 0)
    with torch.no_grad():
        model.head.weight.normal_(std=1, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return classifier()


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    weights = {"model": model.state_dict()}
    checkpoint.save(folder / "checkpoints", 1, weights, {"step": 1}, metadata(model.config))
    return folder


def pictures(folder, classes, each=6, side=20):
    """A folder of noise, so many pictures a class."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            low = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(low).resize((side, side)).save(folder / name / f"{i}.png")
    return folder


def picture(height=32, width=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(1, 3, 6, 6, generator=generator)
    return (torch.nn.functional.interpolate(low, (height, width)) * 255).to(torch.uint8)[0]


def settings(**changes):
    return RobustnessConfig(
        **{"run": "x", "test": ("shapes:8",), "workers": 0, "precision": "fp32", "device": "cpu", **changes}
    )


# ---------------------------------------------------------------------- corruptions


def test_names_are_the_librarys():
    from imagecorruptions import get_corruption_names

    assert list(COMMON) == get_corruption_names("common")
    assert list(EXTRA) == get_corruption_names("validation")
    assert set(ALEXNET) == set(COMMON)


@pytest.mark.parametrize("name", [*COMMON, *EXTRA])
def test_a_corruption_is_a_function_of_seed_image_and_name(name):
    what, pixels = Corruption(name, 3), picture()
    np.random.seed(1)
    one = corrupt(pixels, what, 5, seed=0)
    assert one.shape == pixels.shape
    assert one.dtype == torch.uint8
    assert not torch.equal(one, pixels)
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    corrupt(picture(seed=1), Corruption("gaussian_noise", 2), 6, seed=0)  # something in between
    again = corrupt(pixels, what, 5, seed=0)
    assert torch.equal(again, one)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "snow", "spatter"])
def test_other_images_seeds_and_severities_draw_otherwise(name):
    pixels = picture()
    one = corrupt(pixels, Corruption(name, 3), 5, seed=0)
    assert not torch.equal(corrupt(pixels, Corruption(name, 3), 6, seed=0), one)
    assert not torch.equal(corrupt(pixels, Corruption(name, 3), 5, seed=1), one)
    assert not torch.equal(corrupt(pixels, Corruption(name, 4), 5, seed=0), one)


def test_noise_has_the_published_strength():
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    for severity, deviation in enumerate((0.08, 0.12, 0.18), 1):
        noisy = corrupt(grey, Corruption("gaussian_noise", severity), 0, 0).float() / 255
        assert abs(float(noisy.std()) - deviation) < 0.006
    bright = picture(64, 64)
    dimmed = corrupt(bright, Corruption("contrast", 5), 0, 0)
    deviations = [x.float().std(dim=(1, 2)) for x in (dimmed, bright)]  # of each channel, about its mean
    assert torch.allclose(deviations[0] / deviations[1], torch.tensor(0.05), atol=0.01)


def test_small_pictures_are_enlarged_and_averaged_back():
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (3, 12, 20), generator=generator, dtype=torch.uint8)
    noisy = corrupt(small, Corruption("brightness", 1), 0, 0)
    assert noisy.shape == small.shape
    # Brightness goes pixel by pixel, so enlarging changes nothing in it.
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(corrupt(large, Corruption("brightness", 1), 0, 0)[:, ::4, ::4], noisy)
    assert not torch.equal(noisy, small)


def test_a_picture_without_a_spatter_is_as_it_was():
    pixels = picture(32, 32)
    unchanged = [
        image
        for image in range(300)
        if torch.equal(corrupt(pixels, Corruption("spatter", 1), image, 0), pixels)
    ]
    assert 0 < len(unchanged) < 30  # 1.5% by the library's thresholds; not one is black
    blackest = min(float(corrupt(pixels, Corruption("spatter", 1), i, 0).float().mean()) for i in range(300))
    assert blackest > float(pixels.float().mean()) / 2


@pytest.mark.parametrize(
    "pixels", [torch.rand(3, 40, 40), torch.zeros(1, 40, 40, dtype=torch.uint8), torch.zeros(3, 9).byte()]
)
def test_what_is_no_rgb_is_refused(pixels):
    with pytest.raises(UserError, match="accepted: 8-bit RGB"):
        corrupt(pixels, Corruption("fog", 1), 0, 0)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    corruptions.library.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UserError, match=r"quarterview\[robustness\]"):
        corrupt(picture(), Corruption("fog", 1), 0, 0)
    corruptions.library.cache_clear()


def test_each_image_has_one_corruption_of_its_own():
    drawn = [one_of(COMMON, 3, 0, image) for image in range(1500)]
    assert drawn == [one_of(COMMON, 3, 0, image) for image in range(1500)]
    counts = [sum(what == (Corruption(name, 3),) for what in drawn) for name in COMMON]
    assert sum(counts) == 1500
    assert min(counts) > 60  # 100 each, with a deviation of 10
    assert max(counts) < 140
    assert one_of(COMMON, 3, 1, 0) != one_of(COMMON, 3, 0, 0) or one_of(COMMON, 3, 1, 1) != drawn[1]


# ---------------------------------------------------------------------- over many images


def asked(image):
    return (None, Corruption("shot_noise", 5), Corruption("glass_blur", 2))


def told(model, source, **options):
    found = list(predictions(model, source, asked, precision="fp32", **options))
    return [i for ids, _ in found for i in ids], torch.cat([classes for _, classes in found])


def test_predictions_are_those_of_the_pictures_one_by_one(model):
    source = open_source("shapes:70:size=16", 3)
    ids, classes = told(model, source, batch_size=7)
    assert ids == list(range(70))
    one = class_scores(model)
    for i in (0, 3, 69):
        pixels = source.image(i).pixels
        made = [pixels if what is None else corrupt(pixels, what, i, 0) for what in asked(i)]
        expected = one(torch.stack(made).float() / 255).argmax(dim=1)
        assert torch.equal(classes[i], expected)
    assert len(classes.unique()) > 1
    scores, _ = extract({"": one}, source, range(70), model.config, torch.device("cpu"), precision="fp32")
    assert torch.equal(classes[:, 0], scores[""].argmax(dim=1))


def test_workers_and_broken_images_change_nothing_else(model, tmp_path):
    folder = pictures(tmp_path / "x", NAMES, each=3)
    (folder / "square" / "1.png").write_bytes(b"no picture")
    source = open_source(str(folder), 3)
    ids, classes = told(model, source)
    assert len(ids) == 11
    again, others = told(model, source, workers=2, batch_size=5)
    assert again == ids
    assert torch.equal(others, classes)


def test_sixteen_bits_and_other_channels_are_refused(model, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 2**16, (4, 16, 16, 3), dtype=np.uint16))
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"x\.npy.*: a picture of .*accepted: 8-bit RGB"):
            told(model, open_source(str(tmp_path / "x.npy"), 3), workers=workers)
    grey = classifier(ClassifierConfig("mae_vit_32x2x2_patch4", (16, 16), 1, (0.5,), (0.5,), classes=4))
    with pytest.raises(UserError, match="1 channel"):
        told(grey, open_source("shapes:4:size=16", 1))


# ---------------------------------------------------------------------- the mCE


def test_mce_by_hand():
    accuracies = {
        name: {severity: 1 - ALEXNET[name] * share for severity, share in enumerate(shares, 1)}
        for name, shares in zip(COMMON, [(0.1, 0.2, 0.3, 0.4, 0.5)] * 14 + [(1.0,) * 5], strict=True)
    }
    found = Corrupted(
        10, 0, 4, 0.9, {**accuracies, "spatter": dict.fromkeys(range(1, 6), 0.0)}, (1, 2, 3, 4, 5)
    )
    assert found.corruption_errors["fog"] == pytest.approx(0.3)
    assert found.mce == pytest.approx((14 * 0.3 + 1) / 15)
    expected = sum(0.3 * ALEXNET[name] for name in COMMON[:14]) + ALEXNET[COMMON[14]]
    assert found.mean_error == pytest.approx(expected / 15)


def test_alexnet_itself_has_100():
    accuracies = {name: dict.fromkeys(range(1, 6), 1 - error) for name, error in ALEXNET.items()}
    assert Corrupted(1, 0, 2, 0.5, accuracies, (1, 2, 3, 4, 5)).mce == pytest.approx(1)
    # the published mean error, 78.8 percent before rounding, of its 15 kinds
    assert sum(ALEXNET.values()) / 15 == pytest.approx(0.788, abs=0.001)


# ---------------------------------------------------------------------- other sets


def test_a_set_is_judged_between_its_own_classes(model, tmp_path):
    source = open_source(str(pictures(tmp_path / "few", ("a star", "square"), each=10)), 3)
    classes = {"a star": "star"}
    truth = classes_of(source, model.config, classes, "few")
    assert truth.tolist() == [3] * 10 + [1] * 10
    found = set_accuracy(model, source, truth, settings())
    scores, _ = extract(
        {"": class_scores(model)}, source, range(20), model.config, torch.device("cpu"), precision="fp32"
    )
    by_hand = [(3 if row[3] > row[1] else 1) == int(t) for row, t in zip(scores[""], truth, strict=True)]
    assert found.accuracy == pytest.approx(np.mean(by_hand))
    assert (found.classes, found.images) == (2, 20)
    unrestricted = (scores[""].argmax(dim=1) == truth).double().mean()
    assert float(unrestricted) < found.accuracy  # which shows that some were taken for other classes


def test_a_set_of_one_class_is_refused_before_anything_takes_long(run, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "one", ("star", "square"))
    (tmp_path / "map.csv").write_text("square,star\n")
    monkeypatch.setattr("quarterview.commands.robustness._corrupted", lambda *_: pytest.fail("begun"))
    with pytest.raises(UserError, match="the set few has images of one class only"):
        robustness(
            settings(
                run=str(run),
                test=("shapes:8:size=16",),
                sets=(f"few={folder}",),
                class_map=str(tmp_path / "map.csv"),
            ),
            Console(quiet=True),
        )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", '{"n01": "star",\n\t"n02": 1}'),
        ("x.yaml", "n01: star\nn02: 1\n"),
        ("x.csv", 'n01,"star"\n\nn02,1\n'),
        ("x.tsv", "n01\tstar\nn02\t1\n"),
        ("x.txt", "n01 star\nn02 1\n"),
        ("x.csv", "\ufeffn01,star\nn02,1\n"),
    ],
)
def test_class_maps(tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8")
    assert read_class_map(tmp_path / name) == {"n01": "star", "n02": "1"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.yaml", "no: star", "in quotes"),
        ("x.yaml", "- star", "no table"),
        ("x.json", "{", "no JSON"),
        ("x.json", '{"n01": 1, "n01": 2}', "n01 is there twice"),
        ("x.yaml", "n01: 1\nn01: 2", "n01 is there twice"),
        ("x.csv", "n01,star,2", "accepted: a name and a class"),
        ("x.txt", "n01 star\nn01 square", "two classes"),
        ("x.xml", "", "accepted: .json"),
    ],
)
def test_what_is_no_class_map(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read_class_map(tmp_path / name)


def test_a_class_map_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_class_map(tmp_path / "x.csv")


def test_unknown_classes_are_told_with_what_is_accepted(tmp_path):
    source = open_source(str(pictures(tmp_path / "x", ("sqare", "star"), each=1)), 3)
    with pytest.raises(UserError, match=r"'sqare'; accepted: circle, square, triangle, star.*'square'"):
        classes_of(source, CONFIG, {}, "x")
    assert classes_of(source, CONFIG, {"sqare": "1"}, "x").tolist() == [1, 3]
    with pytest.raises(UserError, match="'4'"):
        classes_of(source, CONFIG, {"sqare": "4"}, "x")
    many = ClassifierConfig("mae_vit_32x2x2_patch4", classes=99, class_names=[f"star{i}" for i in range(99)])
    with pytest.raises(UserError, match="99 in all") as raised:
        classes_of(source, many, {}, "x")
    assert len(str(raised.value)) < 300
    twice = ClassifierConfig("mae_vit_32x2x2_patch4", classes=3, class_names=("star", "star", "sqare"))
    with pytest.raises(UserError, match="accepted: a number"):
        classes_of(source, twice, {}, "x")


def test_a_classifier_without_names(tmp_path):
    source = open_source(str(pictures(tmp_path / "x", ("n01", "n02"), each=1)), 3)
    three = ClassifierConfig("mae_vit_32x2x2_patch4", classes=3)
    with pytest.raises(UserError, match="accepted: 0 to 2, or --class-map"):
        classes_of(source, three, {}, "x")
    assert classes_of(source, three, {"n01": "2", "n02": "0"}, "x").tolist() == [2, 0]
    two = ClassifierConfig("mae_vit_32x2x2_patch4", classes=2)
    assert classes_of(source, two, {}, "x").tolist() == [0, 1]
    assert classes_of(source, two, {"n01": "1", "n02": "0"}, "x").tolist() == [1, 0]
    numbered = open_source(str(pictures(tmp_path / "y", ("2", "10"), each=1)), 3)
    eleven = ClassifierConfig("mae_vit_32x2x2_patch4", classes=11)
    assert classes_of(numbered, eleven, {}, "y").tolist() == [10, 2]
    folders = tuple(str(i) for i in range(11))  # of which 10 comes after 1 in a folder
    every = open_source(str(pictures(tmp_path / "z", folders, each=1)), 3)
    assert classes_of(every, eleven, {}, "z").tolist() == [0, 1, 10, *range(2, 10)]


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corruptions": ("glas_blur",)}, "glass_blur"),
        ({"severities": (0,)}, "numbers from 1 to 5"),
        ({"severities": ()}, "--severities is empty"),
        ({"alexnet": True, "severities": (3,)}, "--alexnet"),
        ({"alexnet": True, "corruptions": ("extra",)}, "--alexnet"),
        ({"alexnet": True, "test": (), "sets": ("a=x",)}, "--alexnet"),
        ({"sets": ("folder",)}, "NAME=IMAGES"),
        ({"sets": ("a=x", "a=y")}, "different names"),
        ({"workers": -1}, "--workers -1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"crop_pct": 2.0}, "--crop-pct 2"),
    ],
)
def test_what_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        settings(**changes)


def test_no_images_are_refused():
    with pytest.raises(UserError, match="--test IMAGES"):
        robustness(settings(test=()), Console(quiet=True))


def test_the_names_of_groups():
    assert settings().names == COMMON
    assert settings(corruptions=("all",)).names == (*COMMON, *EXTRA)
    assert settings(corruptions=("fog", "extra", "fog")).names == ("fog", *EXTRA)


def test_the_command(run, tmp_path, capsys):
    test = pictures(tmp_path / "test", NAMES)
    sketch = pictures(tmp_path / "sketch", ("ring", "star"))
    (tmp_path / "map.csv").write_text("ring,circle\n")
    words = ["robustness", str(run), "--test", str(test), "--sets", f"sketch={sketch}", f"same={test}"]
    words += ["--class-map", str(tmp_path / "map.csv"), "--corruptions", "fog", "glass_blur", "saturate"]
    words += ["--severities", "5", "1", "--workers", "0", "--device", "cpu"]
    assert run_cli(words) == 0
    out = capsys.readouterr().out
    for said in ("glass blur", "by severity", "clean error", "2 of the 15", "sketch", "50.0%"):
        assert said in " ".join(out.split())
    assert "mCE" not in out
    names = ("corrupted", "set-sketch", "set-same")

    def written():
        return {name: json.loads((run / "results" / f"{name}.json").read_text()) for name in names}

    found = written()
    corrupted, sketch, same = found.values()
    assert corrupted["argv"][:2] == ["quarterview", "robustness"]
    assert corrupted["settings"]["library"].startswith("imagecorruptions-imaug ")
    assert sketch["settings"]["class_map"] == {"ring": "circle"}
    assert sketch["data"]["images"] == 12
    results = corrupted["results"]
    assert results["accuracies"].keys() == {"fog", "glass_blur", "saturate"}
    assert results["accuracies"]["fog"].keys() == {"1", "5"}
    assert results["clean"] == same["results"]["accuracy"]  # of all its classes
    assert (results["images"], results["classes"]) == (24, 4)
    assert sketch["results"]["classes"] == 2

    assert run_cli([*words, "--seed", "0"]) == 0
    assert [each["results"] for each in written().values()] == [each["results"] for each in found.values()]


def test_the_command_with_alexnet(run, capsys):
    config = settings(run=str(run), test=("shapes:8:size=16",), alexnet=True, class_map=None)
    with pytest.raises(UserError, match="class of --test"):  # ten classes of shapes
        robustness(config, Console())
    model = classifier(
        ClassifierConfig("mae_vit_32x2x2_patch4", (16, 16), 3, (0.5,) * 3, (0.25,) * 3, classes=10)
    )
    folder = run.parent / "ten"
    checkpoint.save(
        folder / "checkpoints", 1, {"model": model.state_dict()}, {"step": 1}, metadata(model.config)
    )
    found = robustness(settings(run=str(folder), test=("shapes:8:size=16",), alexnet=True), Console())
    out = capsys.readouterr().out
    assert found.corrupted is not None
    assert f"mCE {100 * found.corrupted.mce:.1f}: the mean of errors as shares of AlexNet's" in out
    for name in ("elastic transform", "jpeg compression"):
        assert name in out  # nothing is cut off at 80 columns
    written = json.loads((folder / "results" / "corrupted.json").read_text())
    assert written["results"]["mce"] == found.corrupted.mce
    assert len(written["results"]["accuracies"]) == 15


def test_what_is_no_classifier_is_refused(tmp_path, capsys):
    assert run_cli(["robustness", str(tmp_path), "--test", "shapes:8", "--device", "cpu"]) == 2
    assert "accepted" in capsys.readouterr().err


def test_the_same_in_any_company(model):
    """A condition's figures do not depend on which others are asked for beside it."""
    source = open_source("shapes:20:size=16", 3)
    fog = Corruption("fog", 3)

    def of(conditions):
        found = predictions(model, source, lambda image: all_of(conditions, image), precision="fp32")
        return torch.cat([classes for _, classes in found])

    alone, beside = of((fog,)), of((Corruption("snow", 1), fog))
    assert torch.equal(alone[:, 0], beside[:, 1])
