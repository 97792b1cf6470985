"""Tests of the measures of a study: visible patches, features without a network, corrupted images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from quarterview.commands.config import PretrainConfig
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import to_float
from quarterview.errors import RunError, UserError
from quarterview.evaluation import corruptions
from quarterview.evaluation.config import COMMON_CORRUPTIONS
from quarterview.evaluation.corruptions import choose_one, corrupt
from quarterview.evaluation.features import make_encoder, make_logits_fn, make_masked_encoder
from quarterview.evaluation.labelled import open_split
from quarterview.models.create import create_model
from quarterview.studies.conduct import run_study
from quarterview.studies.config import StudyConfig, check_measure
from quarterview.studies.measure import check_measures, evaluate_arm, read_evaluations
from quarterview.studies.named import STUDIES
from quarterview.studies.plain_features import (
    NUM_CLUSTERS,
    NUM_PATCH_COMPONENTS,
    _compute_triangle_activations,
    fit_image_kmeans,
    fit_image_pca,
    fit_patch_kmeans,
    fit_patch_pca,
)
from quarterview.studies.plan import make_base_config, plan_arms
from quarterview.weights.loading import load_classifier


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("mae_vit_32x2x2_patch4", image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3).eval()


def test_a_visible_ratio_of_1_gives_the_features_of_the_whole_image(model):
    images = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(
        make_masked_encoder(model, 1.0, 0)(images), make_encoder(model, "mean")(images)
    )


def test_features_depend_only_on_the_visible_patches(model):
    images = torch.rand(400, 3, 16, 16)
    changed = images.clone()
    changed[:, :, :4, :4] = torch.rand(400, 3, 4, 4)  # the first of 16 patches
    one, two = (make_masked_encoder(model, 0.25, 3)(x) for x in (images, changed))
    fraction = float((one != two).any(dim=1).float().mean())
    assert abs(fraction - 0.25) < 0.07
    encode = make_masked_encoder(model, 0.25, 3)
    again = torch.cat([encode(images[:150]), encode(images[150:])])
    torch.testing.assert_close(again, one)
    assert not torch.equal(make_masked_encoder(model, 0.25, 4)(images), one)


def test_principal_components_of_images_agree_with_scikit_learn():
    source = open_source("shapes:300:size=8", 3)
    images = to_float(torch.stack([source.image(i).pixels for i in range(300)]))
    features = fit_image_pca(source, (8, 8), 0)(images)
    assert features.shape == (300, 128)
    reference = PCA(whiten=True).fit_transform(images.flatten(1).numpy())[:, :5]
    ours = features[:, :5].numpy()
    signs = np.sign((ours * reference).sum(0))
    np.testing.assert_allclose(ours * signs, reference, rtol=0.02, atol=0.02)


@pytest.fixture
def stripes(tmp_path) -> np.ndarray:
    """Images of random stripes, uint8 [120, 16, 16, 3], alternately horizontal and vertical."""
    generator = np.random.default_rng(0)
    lines = generator.integers(0, 256, (120, 16, 1, 1), dtype=np.uint8).repeat(16, 2).repeat(3, 3)
    lines[1::2] = lines[1::2].transpose(0, 2, 1, 3)
    np.save(tmp_path / "x.npy", lines)
    return lines


@pytest.mark.parametrize(
    ("make", "width"), [(fit_patch_kmeans, 4 * NUM_CLUSTERS), (fit_patch_pca, 4 * 2 * NUM_PATCH_COMPONENTS)]
)
def test_patch_features_distinguish_directions_of_stripes(tmp_path, stripes, make, width):
    source = open_source(str(tmp_path / "x.npy"), 3)
    encode = make(source, (16, 16), 0)
    features = encode(to_float(torch.from_numpy(stripes).permute(0, 3, 1, 2)))
    assert features.shape == (120, width)
    assert features.min() >= 0
    unit = torch.nn.functional.normalize(features, dim=1)
    similar = unit @ unit.T - 2 * torch.eye(120)
    assert float((similar.argmax(1) % 2 == torch.arange(120) % 2).float().mean()) > 0.95
    some = torch.rand(2, 3, 16, 16)
    assert torch.equal(make(source, (16, 16), 0)(some), encode(some))


def test_principal_components_of_patches_agree_with_scikit_learn(tmp_path):
    # With images of a single patch, the features of all quarters are those of the patch.
    pixels = np.random.default_rng(0).integers(0, 256, (300, 6, 6, 3), dtype=np.uint8)
    pixels[:, :3] //= 4  # gives the components different variances
    pixels[:, :, :2] //= 3
    np.save(tmp_path / "x.npy", pixels)
    images = to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    features = fit_patch_pca(open_source(str(tmp_path / "x.npy"), 3), (6, 6), 0)(images)
    quarters = features.unflatten(1, (2 * NUM_PATCH_COMPONENTS, 4))
    assert torch.equal(quarters, quarters[:, :, :1].expand(-1, -1, 4))
    positive, negative = quarters[:, :, 0].chunk(2, dim=1)
    assert not (positive * negative).any()
    rows = images.flatten(1).numpy()
    normalized = (rows - rows.mean(1, keepdims=True)) / np.sqrt(
        rows.var(1, ddof=1, keepdims=True) + 10 / 255**2
    )
    reference = PCA(whiten=True).fit_transform(normalized)[:, :2]
    ours = (positive - negative)[:, :2].numpy()
    ours *= np.sign((ours * reference).sum(0))
    np.testing.assert_allclose(ours, reference, rtol=0.02, atol=0.05)


def test_clusters_of_images_are_found(tmp_path):
    # As many distinct images as clusters, each twice: most become a cluster of their own (about 60% would by
    # chance).
    pixels = (
        np.random.default_rng(0).integers(0, 256, (NUM_CLUSTERS, 8, 8, 3), dtype=np.uint8).repeat(2, axis=0)
    )
    np.save(tmp_path / "x.npy", pixels)
    images = to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    features = fit_image_kmeans(open_source(str(tmp_path / "x.npy"), 3), (8, 8), 0)(images)
    assert features.shape == (2 * NUM_CLUSTERS, NUM_CLUSTERS)
    first, second = features.argmax(1).unflatten(0, (NUM_CLUSTERS, 2)).T
    assert torch.equal(first, second)
    assert len(first.unique()) > 0.8 * NUM_CLUSTERS


def test_triangle_activations_by_hand():
    centres = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    expected = torch.tensor([0.0, 1.0, 2.0])  # distances of 5, 1 and 0: 2 on average
    torch.testing.assert_close(_compute_triangle_activations(torch.zeros(1, 2), centres), expected[None])
    torch.testing.assert_close(
        _compute_triangle_activations(torch.zeros(2, 4, 2), centres), expected.expand(2, 4, 3)
    )


def test_few_images_give_few_clusters_and_one_image_is_an_error():
    few, one = open_source("shapes:3:size=8", 3), open_source("shapes:1:size=8", 3)
    images = torch.rand(2, 3, 8, 8)
    assert fit_patch_kmeans(few, (8, 8), 0)(images).shape == (2, 4 * 60)
    assert fit_image_kmeans(few, (8, 8), 0)(images).shape == (2, 3)
    for make in (fit_image_pca, fit_image_kmeans):
        with pytest.raises(RunError, match="need at least 2 images, but --data has 1"):
            make(one, (8, 8), 0)


@pytest.mark.slow
def test_patch_features_are_better_than_random_weights(tmp_path):
    train, test = ("shapes:800:size=32:seed=7",), ("shapes:800:size=32:seed=8",)
    pretraining = PretrainConfig.from_flags(data=train, image_size=32, model="mae_vit_64x3x4_patch4")
    study = StudyConfig(data=train, train=train, test=test, out=str(tmp_path), device="cpu")
    images = open_split(train, test, 3)
    accuracy = {
        start: evaluate_arm(None, start, pretraining, ["linear"], images, study, 0, tmp_path / start)[
            "linear"
        ].mean()
        for start in ("random", "kmeans", "pca_patches")
    }
    assert min(accuracy["kmeans"], accuracy["pca_patches"]) > 1.5 * accuracy["random"]


@pytest.mark.parametrize(
    "measure", ["linear", "knn@10", "linear@100", "finetune", "finetune:0.5", "finetune:all", "corrupted"]
)
def test_measures(measure):
    check_measure(measure)


@pytest.mark.parametrize(
    "measure",
    [
        "probe",
        "linear:2",
        "finetune@50",
        "corrupted:1",
        "corrupted@50",
        "knn@0",
        "knn@101",
        "linear@x",
        "finetune:-1",
    ],
)
def test_invalid_measures(measure):
    with pytest.raises(UserError):
        check_measure(measure)


def test_measures_that_do_not_fit_an_arm():
    four = PretrainConfig.from_flags(model="mae_vit_32x4x2_patch4", image_size=16)
    check_measures("kmeans", ["linear", "knn"], four)
    check_measures("pretrain", ["finetune:4", "finetune:all", "linear@50", "corrupted"], four)
    for start, measure, message in (
        ("pixels", "finetune", "not supported with an arm of pixels, which has no network"),
        ("pixels", "corrupted", "not supported with an arm of pixels, which has no network"),
        ("pca", "knn@50", "not supported with an arm of pca, which has no network"),
        ("pretrain", "finetune:5", "needs 5 blocks, but the encoder has 4. Give at most finetune:4"),
    ):
        with pytest.raises(UserError, match=message):
            check_measures(start, [measure], four)
    with pytest.raises(UserError, match="corrupted is not supported with --in-chans 1"):
        check_measures("pretrain", ["corrupted"], four.with_flags(in_chans=1))


# ---------------------------------------------------------------------- corrupted images


def config(out: Path, **changes) -> StudyConfig:
    values = {
        **{"data": ("shapes:48:size=16",), "train": ("shapes:80:size=16:seed=1",), "seeds": 1},
        **{"test": ("shapes:60:size=16:seed=2",), "out": str(out), "budget": "64images"},
        **{"model": "mae_vit_32x2x2_patch4", "image_size": 16, "batch_size": 16, "labels": 40},
        **{"tune_steps": 3, "device": "cpu", "workers": 0},
    }
    return StudyConfig(**{**values, **changes})


@pytest.mark.parametrize("measures", [("corrupted",), ("corrupted", "finetune")])
def test_corrupted_images_are_classified_by_the_fine_tuned_model(tmp_path, measures):
    settings = config(tmp_path)
    base = make_base_config(STUDIES["robustness"], settings).with_flags(precision="fp32")
    images = open_split(settings.train, settings.test, 3)
    correct = evaluate_arm(None, "random", base, measures, images, settings, 0, tmp_path / "arm")
    assert correct.keys() == read_evaluations(tmp_path / "arm").keys() == set(measures)
    is_correct = correct["corrupted"]
    assert (is_correct.shape, is_correct.dtype) == ((60,), bool)

    model = load_classifier(tmp_path / "arm" / "finetune")
    pixels = [images.test.image(i).pixels for i in range(60)]
    changed = [corrupt(x, *choose_one(COMMON_CORRUPTIONS, 3, 0, i), i, 0) for i, x in enumerate(pixels)]
    predicted, clean = (make_logits_fn(model)(to_float(torch.stack(x))).argmax(1) for x in (changed, pixels))
    np.testing.assert_array_equal(is_correct, (predicted == images.test_labels).numpy())
    if "finetune" in measures:
        np.testing.assert_array_equal(correct["finetune"], (clean == images.test_labels).numpy())
        weights = tmp_path / "arm" / "finetune" / "checkpoints"
        before = sorted(weights.rglob("*"))
        (tmp_path / "arm" / "judged.npz").unlink()
        again = evaluate_arm(None, "random", base, ("corrupted",), images, settings, 0, tmp_path / "arm")
        np.testing.assert_array_equal(again["corrupted"], is_correct)
        assert sorted(weights.rglob("*")) == before


def test_the_robustness_study(tmp_path):
    arms = plan_arms(STUDIES["robustness"], config(tmp_path), "tokenizer")
    assert {one.arm.name for one in arms} == {"random weights", "MoCo v3", "MAE"}
    assert {one.measures for one in arms} == {("finetune", "corrupted")}
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "base: {decoder_depth: 1, decoder_width: 32, decoder_heads: 2, precision: fp32}\n"
        "tables:\n"
        "  - title: Corrupted images\n"
        "    measures: [corrupted]\n"
        "    arms: {MAE: {}, random weights: random}\n"
        "    findings: [{claim: it helps, first: MAE, second: random weights, measure: corrupted}]\n"
    )
    result = run_study(config(tmp_path / "out", name=str(mine)))
    assert result.status == "complete"
    assert "corrupted images" in (tmp_path / "out" / "report.html").read_text()


def test_a_missing_package_is_an_error_before_training(monkeypatch):
    corruptions.load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UserError, match="robustness"):
        check_measures("random", ["finetune", "corrupted"], PretrainConfig())
    corruptions.load_library.cache_clear()
