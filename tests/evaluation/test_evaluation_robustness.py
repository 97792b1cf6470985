"""Robustness: keyed corruptions, the mCE, other sets, class maps, and the command."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from quarterview.cli import run as run_cli
from quarterview.commands.robustness import evaluate_robustness
from quarterview.data.sources.open import open_source
from quarterview.errors import UserError
from quarterview.evaluation import corruptions
from quarterview.evaluation.class_map import map_labels, read_class_map
from quarterview.evaluation.config import COMMON_CORRUPTIONS, EXTRA_CORRUPTIONS, RobustnessConfig
from quarterview.evaluation.corruptions import (
    Corruption,
    choose_all,
    choose_one,
    corrupt,
    predict_corrupted,
)
from quarterview.evaluation.features import extract_features, make_logits_fn
from quarterview.evaluation.robustness import ALEXNET_ERRORS, CorruptionResult, evaluate_set
from quarterview.models.config import ClassifierConfig
from quarterview.models.create import create_classifier
from quarterview.training import checkpoint
from quarterview.training.console import Console
from quarterview.weights.loading import make_metadata

NAMES = ("circle", "square", "triangle", "star")
CONFIG = ClassifierConfig(
    *("mae_vit_32x2x2_patch4", (16, 16), 3, (0.5,) * 3, (0.25,) * 3), classes=4, class_names=NAMES
)


def classifier(config=CONFIG):
    """Return a classifier whose random weights give different predictions for different images."""
    model = create_classifier(config, 0)
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
    checkpoint.save(folder / "checkpoints", 1, weights, {"step": 1}, make_metadata(model.config))
    return folder


def write_images(folder, classes, per_class=6, side=20):
    """Write a folder of random images with a sub-folder for each class."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            low = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(low).resize((side, side)).save(folder / name / f"{i}.png")
    return folder


def random_image(height=32, width=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(1, 3, 6, 6, generator=generator)
    return (torch.nn.functional.interpolate(low, (height, width)) * 255).to(torch.uint8)[0]


def make_config(**changes):
    return RobustnessConfig(
        **{"run": "x", "test": ("shapes:8",), "workers": 0, "precision": "fp32", "device": "cpu", **changes}
    )


# ---------------------------------------------------------------------- corruptions


def test_the_names_are_those_of_the_library():
    from imagecorruptions import get_corruption_names

    assert list(COMMON_CORRUPTIONS) == get_corruption_names("common")
    assert list(EXTRA_CORRUPTIONS) == get_corruption_names("validation")
    assert set(ALEXNET_ERRORS) == set(COMMON_CORRUPTIONS)


@pytest.mark.parametrize("name", [*COMMON_CORRUPTIONS, *EXTRA_CORRUPTIONS])
def test_a_corruption_is_a_function_of_seed_image_and_name(name):
    corruption, pixels = Corruption(name, 3), random_image()
    np.random.seed(1)
    first = corrupt(pixels, corruption, 5, seed=0)
    assert first.shape == pixels.shape
    assert first.dtype == torch.uint8
    assert not torch.equal(first, pixels)
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    corrupt(random_image(seed=1), Corruption("gaussian_noise", 2), 6, seed=0)  # another corruption in between
    again = corrupt(pixels, corruption, 5, seed=0)
    assert torch.equal(again, first)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "snow", "spatter"])
def test_the_draws_depend_on_image_seed_and_severity(name):
    pixels = random_image()
    first = corrupt(pixels, Corruption(name, 3), 5, seed=0)
    assert not torch.equal(corrupt(pixels, Corruption(name, 3), 6, seed=0), first)
    assert not torch.equal(corrupt(pixels, Corruption(name, 3), 5, seed=1), first)
    assert not torch.equal(corrupt(pixels, Corruption(name, 4), 5, seed=0), first)


def test_noise_and_contrast_have_the_published_strength():
    gray = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    for severity, std in enumerate((0.08, 0.12, 0.18), 1):
        noisy = corrupt(gray, Corruption("gaussian_noise", severity), 0, 0).float() / 255
        assert abs(float(noisy.std()) - std) < 0.006
    bright = random_image(64, 64)
    dimmed = corrupt(bright, Corruption("contrast", 5), 0, 0)
    stds = [x.float().std(dim=(1, 2)) for x in (dimmed, bright)]  # of each channel
    assert torch.allclose(stds[0] / stds[1], torch.tensor(0.05), atol=0.01)


def test_small_images_are_enlarged_and_averaged_down():
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (3, 12, 20), generator=generator, dtype=torch.uint8)
    noisy = corrupt(small, Corruption("brightness", 1), 0, 0)
    assert noisy.shape == small.shape
    # Brightness works on single pixels, so enlarging does not change the result.
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(corrupt(large, Corruption("brightness", 1), 0, 0)[:, ::4, ::4], noisy)
    assert not torch.equal(noisy, small)


def test_an_image_without_spatter_is_unchanged():
    pixels = random_image(32, 32)
    unchanged = [
        image
        for image in range(300)
        if torch.equal(corrupt(pixels, Corruption("spatter", 1), image, 0), pixels)
    ]
    assert 0 < len(unchanged) < 30  # 1.5% by the thresholds of the library
    darkest = min(float(corrupt(pixels, Corruption("spatter", 1), i, 0).float().mean()) for i in range(300))
    assert darkest > float(pixels.float().mean()) / 2


@pytest.mark.parametrize(
    "pixels", [torch.rand(3, 40, 40), torch.zeros(1, 40, 40, dtype=torch.uint8), torch.zeros(3, 9).byte()]
)
def test_images_that_are_not_8_bit_rgb_are_refused(pixels):
    with pytest.raises(UserError, match="Give 8-bit RGB"):
        corrupt(pixels, Corruption("fog", 1), 0, 0)


def test_a_missing_library_is_reported_with_its_extra(monkeypatch):
    corruptions.load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UserError, match=r"quarterview\[robustness\]"):
        corrupt(random_image(), Corruption("fog", 1), 0, 0)
    corruptions.load_library.cache_clear()


def test_each_image_has_one_random_corruption():
    chosen = [choose_one(COMMON_CORRUPTIONS, 3, 0, image) for image in range(1500)]
    assert chosen == [choose_one(COMMON_CORRUPTIONS, 3, 0, image) for image in range(1500)]
    counts = [sum(each == (Corruption(name, 3),) for each in chosen) for name in COMMON_CORRUPTIONS]
    assert sum(counts) == 1500
    assert min(counts) > 60  # 100 expected, with a std of 10
    assert max(counts) < 140
    assert (
        choose_one(COMMON_CORRUPTIONS, 3, 1, 0) != choose_one(COMMON_CORRUPTIONS, 3, 0, 0)
        or choose_one(COMMON_CORRUPTIONS, 3, 1, 1) != chosen[1]
    )


# ---------------------------------------------------------------------- predictions


def policy(image_index):
    return (None, Corruption("shot_noise", 5), Corruption("glass_blur", 2))


def predict(model, source, **options):
    batches = list(predict_corrupted(model, source, policy, precision="fp32", **options))
    return [i for ids, _ in batches for i in ids], torch.cat([classes for _, classes in batches])


def test_predictions_equal_those_of_single_images(model):
    source = open_source("shapes:70:size=16", 3)
    ids, classes = predict(model, source, batch_size=7)
    assert ids == list(range(70))
    compute_logits = make_logits_fn(model)
    for i in (0, 3, 69):
        pixels = source.image(i).pixels
        images = [pixels if c is None else corrupt(pixels, c, i, 0) for c in policy(i)]
        expected = compute_logits(torch.stack(images).float() / 255).argmax(dim=1)
        assert torch.equal(classes[i], expected)
    assert len(classes.unique()) > 1
    scores, _ = extract_features(
        {"": compute_logits}, source, range(70), model.config, torch.device("cpu"), precision="fp32"
    )
    assert torch.equal(classes[:, 0], scores[""].argmax(dim=1))


def test_workers_do_not_change_predictions_and_unreadable_images_are_left_out(model, tmp_path):
    folder = write_images(tmp_path / "x", NAMES, per_class=3)
    (folder / "square" / "1.png").write_bytes(b"not an image")
    source = open_source(str(folder), 3)
    ids, classes = predict(model, source)
    assert len(ids) == 11
    other_ids, other_classes = predict(model, source, num_workers=2, batch_size=5)
    assert other_ids == ids
    assert torch.equal(other_classes, classes)


def test_16_bit_images_and_other_channels_are_refused(model, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 2**16, (4, 16, 16, 3), dtype=np.uint16))
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"x\.npy.*: Cannot corrupt an image of .*Give 8-bit RGB"):
            predict(model, open_source(str(tmp_path / "x.npy"), 3), num_workers=workers)
    gray = classifier(ClassifierConfig("mae_vit_32x2x2_patch4", (16, 16), 1, (0.5,), (0.5,), classes=4))
    with pytest.raises(UserError, match="1 channel"):
        predict(gray, open_source("shapes:4:size=16", 1))


# ---------------------------------------------------------------------- mCE


def test_the_mce_equals_the_formula():
    accuracies = {
        name: {severity: 1 - ALEXNET_ERRORS[name] * ratio for severity, ratio in enumerate(ratios, 1)}
        for name, ratios in zip(
            COMMON_CORRUPTIONS, [(0.1, 0.2, 0.3, 0.4, 0.5)] * 14 + [(1.0,) * 5], strict=True
        )
    }
    result = CorruptionResult(
        10, 0, 4, 0.9, {**accuracies, "spatter": dict.fromkeys(range(1, 6), 0.0)}, (1, 2, 3, 4, 5)
    )
    assert result.corruption_errors["fog"] == pytest.approx(0.3)
    assert result.mce == pytest.approx((14 * 0.3 + 1) / 15)
    expected = (
        sum(0.3 * ALEXNET_ERRORS[name] for name in COMMON_CORRUPTIONS[:14])
        + ALEXNET_ERRORS[COMMON_CORRUPTIONS[14]]
    )
    assert result.mean_error == pytest.approx(expected / 15)


def test_the_mce_of_alexnet_is_1():
    accuracies = {name: dict.fromkeys(range(1, 6), 1 - error) for name, error in ALEXNET_ERRORS.items()}
    assert CorruptionResult(1, 0, 2, 0.5, accuracies, (1, 2, 3, 4, 5)).mce == pytest.approx(1)
    # the published mean error over the 15 corruptions, 78.8%
    assert sum(ALEXNET_ERRORS.values()) / 15 == pytest.approx(0.788, abs=0.001)


# ---------------------------------------------------------------------- other sets


def test_predictions_are_limited_to_the_classes_of_a_set(model, tmp_path):
    source = open_source(str(write_images(tmp_path / "few", ("a star", "square"), per_class=10)), 3)
    classes = {"a star": "star"}
    labels = map_labels(source, model.config, classes, "few")
    assert labels.tolist() == [3] * 10 + [1] * 10
    result = evaluate_set(model, source, labels, make_config())
    logits, _ = extract_features(
        {"": make_logits_fn(model)}, source, range(20), model.config, torch.device("cpu"), precision="fp32"
    )
    expected = [
        (3 if row[3] > row[1] else 1) == int(label) for row, label in zip(logits[""], labels, strict=True)
    ]
    assert result.accuracy == pytest.approx(np.mean(expected))
    assert (result.classes, result.images) == (2, 20)
    unrestricted = (logits[""].argmax(dim=1) == labels).double().mean()
    assert float(unrestricted) < result.accuracy  # some images are predicted as classes outside of the set


def test_a_set_of_one_class_is_refused_early(run, tmp_path, monkeypatch):
    folder = write_images(tmp_path / "one", ("star", "square"))
    (tmp_path / "map.csv").write_text("square,star\n")
    monkeypatch.setattr(
        "quarterview.commands.robustness._evaluate_corrupted", lambda *_: pytest.fail("begun")
    )
    with pytest.raises(UserError, match="the set few has images of one class only"):
        evaluate_robustness(
            make_config(
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
    ("name", "text", "message"),
    [
        ("x.yaml", "no: star", "in quotes"),
        ("x.yaml", "- star", "is not a mapping"),
        ("x.json", "{", "is not valid JSON"),
        ("x.json", '{"n01": 1, "n01": 2}', "n01 occurs twice"),
        ("x.yaml", "n01: 1\nn01: 2", "duplicate key n01"),
        ("x.csv", "n01,star,2", "two columns, a name and a class"),
        ("x.txt", "n01 star\nn01 square", "two classes"),
        ("x.xml", "", "Give a .json"),
    ],
)
def test_invalid_class_maps_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_class_map(tmp_path / name)


def test_a_missing_class_map_is_refused(tmp_path):
    with pytest.raises(UserError, match="Cannot read class map"):
        read_class_map(tmp_path / "x.csv")


def test_unknown_classes_are_refused_with_the_classes_of_the_classifier(tmp_path):
    source = open_source(str(write_images(tmp_path / "x", ("sqare", "star"), per_class=1)), 3)
    with pytest.raises(
        UserError, match=r"'sqare'\. Did you mean 'square'\? Give one of: circle, square, triangle, star"
    ):
        map_labels(source, CONFIG, {}, "x")
    assert map_labels(source, CONFIG, {"sqare": "1"}, "x").tolist() == [1, 3]
    with pytest.raises(UserError, match="'4'"):
        map_labels(source, CONFIG, {"sqare": "4"}, "x")
    many = ClassifierConfig("mae_vit_32x2x2_patch4", classes=99, class_names=[f"star{i}" for i in range(99)])
    with pytest.raises(UserError, match="99 in all") as raised:
        map_labels(source, many, {}, "x")
    assert len(str(raised.value)) < 300
    twice = ClassifierConfig("mae_vit_32x2x2_patch4", classes=3, class_names=("star", "star", "sqare"))
    with pytest.raises(UserError, match="Map the name to a class index"):
        map_labels(source, twice, {}, "x")


def test_a_classifier_without_names(tmp_path):
    source = open_source(str(write_images(tmp_path / "x", ("n01", "n02"), per_class=1)), 3)
    three = ClassifierConfig("mae_vit_32x2x2_patch4", classes=3)
    with pytest.raises(UserError, match="indices from 0 to 2, or --class-map"):
        map_labels(source, three, {}, "x")
    assert map_labels(source, three, {"n01": "2", "n02": "0"}, "x").tolist() == [2, 0]
    two = ClassifierConfig("mae_vit_32x2x2_patch4", classes=2)
    assert map_labels(source, two, {}, "x").tolist() == [0, 1]
    assert map_labels(source, two, {"n01": "1", "n02": "0"}, "x").tolist() == [1, 0]
    numbered = open_source(str(write_images(tmp_path / "y", ("2", "10"), per_class=1)), 3)
    eleven = ClassifierConfig("mae_vit_32x2x2_patch4", classes=11)
    assert map_labels(numbered, eleven, {}, "y").tolist() == [10, 2]
    folders = tuple(str(i) for i in range(11))  # in the order of a folder, 10 follows 1
    every = open_source(str(write_images(tmp_path / "z", folders, per_class=1)), 3)
    assert map_labels(every, eleven, {}, "z").tolist() == [0, 1, 10, *range(2, 10)]


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("changes", "message"),
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
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_config(**changes)


def test_missing_images_are_refused():
    with pytest.raises(UserError, match="--test IMAGES"):
        evaluate_robustness(make_config(test=()), Console(quiet=True))


def test_groups_of_corruptions():
    assert make_config().corruption_names == COMMON_CORRUPTIONS
    assert make_config(corruptions=("all",)).corruption_names == (*COMMON_CORRUPTIONS, *EXTRA_CORRUPTIONS)
    assert make_config(corruptions=("fog", "extra", "fog")).corruption_names == ("fog", *EXTRA_CORRUPTIONS)


def test_the_command(run, tmp_path, capsys):
    test = write_images(tmp_path / "test", NAMES)
    sketch = write_images(tmp_path / "sketch", ("ring", "star"))
    (tmp_path / "map.csv").write_text("ring,circle\n")
    arguments = ["robustness", str(run), "--test", str(test), "--sets", f"sketch={sketch}", f"same={test}"]
    arguments += ["--class-map", str(tmp_path / "map.csv"), "--corruptions", "fog", "glass_blur", "saturate"]
    arguments += ["--severities", "5", "1", "--workers", "0", "--device", "cpu"]
    assert run_cli(arguments) == 0
    out = capsys.readouterr().out
    for text in ("glass blur", "by severity", "Clean error", "2 of the 15", "sketch", "50.0%"):
        assert text in " ".join(out.split())
    assert "mCE" not in out
    names = ("corrupted", "set-sketch", "set-same")

    def read_results():
        return {name: json.loads((run / "results" / f"{name}.json").read_text()) for name in names}

    results_by_name = read_results()
    corrupted, sketch, same = results_by_name.values()
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

    assert run_cli([*arguments, "--seed", "0"]) == 0
    assert [each["results"] for each in read_results().values()] == [
        each["results"] for each in results_by_name.values()
    ]


def test_the_command_with_alexnet(run, capsys):
    config = make_config(run=str(run), test=("shapes:8:size=16",), alexnet=True, class_map=None)
    with pytest.raises(UserError, match="class of --test"):  # ten classes of shapes
        evaluate_robustness(config, Console())
    model = classifier(
        ClassifierConfig("mae_vit_32x2x2_patch4", (16, 16), 3, (0.5,) * 3, (0.25,) * 3, classes=10)
    )
    folder = run.parent / "ten"
    checkpoint.save(
        folder / "checkpoints", 1, {"model": model.state_dict()}, {"step": 1}, make_metadata(model.config)
    )
    result = evaluate_robustness(
        make_config(run=str(folder), test=("shapes:8:size=16",), alexnet=True), Console()
    )
    out = capsys.readouterr().out
    assert result.corrupted is not None
    assert f"mCE {100 * result.corrupted.mce:.1f}: the mean ratio of errors to AlexNet's" in out
    for name in ("elastic transform", "jpeg compression"):
        assert name in out  # nothing is cut off at 80 columns
    written = json.loads((folder / "results" / "corrupted.json").read_text())
    assert written["results"]["mce"] == result.corrupted.mce
    assert len(written["results"]["accuracies"]) == 15


def test_other_weights_than_a_classifier_are_refused(tmp_path, capsys):
    assert run_cli(["robustness", str(tmp_path), "--test", "shapes:8", "--device", "cpu"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_predictions_do_not_depend_on_the_other_corruptions(model):
    source = open_source("shapes:20:size=16", 3)
    fog = Corruption("fog", 3)

    def predict_with(conditions):
        batches = predict_corrupted(
            model, source, lambda image: choose_all(conditions, image), precision="fp32"
        )
        return torch.cat([classes for _, classes in batches])

    alone, beside = predict_with((fog,)), predict_with((Corruption("snow", 1), fog))
    assert torch.equal(alone[:, 0], beside[:, 1])
