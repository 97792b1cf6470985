"""Tests of fine-tuning: layer decay, frozen blocks, initial weights, resuming and learning."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from quarterview.commands.config import FinetuneConfig
from quarterview.commands.finetune import finetune, list_parameters
from quarterview.commands.finetune_start import get_initial_config
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import normalize, to_float
from quarterview.errors import UserError
from quarterview.evaluation.predictions import read_predictions
from quarterview.models.classifier import Classifier, freeze_all_but_last_blocks
from quarterview.models.config import ClassifierConfig
from quarterview.models.create import create_model
from quarterview.models.positions import get_2d_sincos_pos_embed
from quarterview.training import checkpoint
from quarterview.training.optim import param_groups_layer_decay
from quarterview.weights.config import parse_num_blocks
from quarterview.weights.loading import (
    load,
    load_autoencoder,
    load_classifier,
    load_encoder_into,
    make_metadata,
)

DEPTH = 3
BASE = ClassifierConfig("mae_vit_32x3x2_patch4", (16, 16), classes=10)
PLAIN = {
    "train": ("shapes:60:size=16",),
    "test": ("shapes:40:seed=1:size=16",),
    "batch_size": 20,
    "steps": 4,
    "randaugment": None,
    "precision": "fp32",
    "workers": 0,
    "lr": 1e-3,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model(
        "mae_vit_32x3x2_patch4",
        image_size=16,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    folder = tmp_path_factory.mktemp("runs") / "x"
    checkpoint.save(
        folder / "checkpoints", 1, {"model": model.state_dict()}, {"step": 1}, make_metadata(model.config)
    )
    return folder


def tuned(run, tmp_path, **options):
    config = FinetuneConfig.from_flags(**{**PLAIN, "run": str(run), "out": str(tmp_path / "ft"), **options})
    return finetune(config)


def weights(folder):
    return load_file(checkpoint.find_newest(folder / "checkpoints") / "model.safetensors")


# ---------------------------------------------------------------------- learning rates


def test_every_parameters_learning_rate_follows_the_formula():
    model = Classifier(BASE)
    rows = {r["name"]: r for r in list_parameters(model, FinetuneConfig.from_flags(lr=0.5, layer_decay=0.65))}
    assert rows.keys() == dict(model.named_parameters()).keys()
    expected = {
        "cls_token": 0,
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "patch_embed.proj.bias": 0,
        "blocks.0.norm1.weight": 1,
        "blocks.0.attn.qkv.weight": 1,
        "blocks.1.mlp.fc2.bias": 2,
        "blocks.2.mlp.fc1.weight": 3,
        "fc_norm.weight": 4,
        "head.weight": 4,
        "head.bias": 4,
    }
    for name, layer in expected.items():
        assert rows[name]["lr"] == pytest.approx(0.5 * 0.65 ** (DEPTH + 1 - layer), rel=1e-12), name
        assert rows[name]["trained"]
    undecayed = {n for n, p in model.named_parameters() if p.ndim == 1} | {"cls_token", "pos_embed"}
    assert {n for n, r in rows.items() if r["weight_decay"] == 0} == undecayed
    assert {r["weight_decay"] for n, r in rows.items() if n not in undecayed} == {0.05}


def test_learning_rates_of_vit_base_at_layer_decay_065_equal_the_paper():
    config = ClassifierConfig("mae_vit_4x12x1_patch4", (8, 8), classes=2)
    table = list_parameters(Classifier(config), FinetuneConfig.from_flags(lr=1.0, layer_decay=0.65))
    rows = {row["name"]: row["lr"] for row in table}
    assert rows["patch_embed.proj.weight"] == pytest.approx(0.0037, abs=5e-5)
    assert rows["blocks.0.attn.qkv.weight"] == pytest.approx(0.0057, abs=5e-5)
    assert rows["blocks.11.mlp.fc1.weight"] == pytest.approx(0.65)
    assert rows["head.weight"] == 1


@pytest.mark.parametrize(
    ("blocks", "trained"),
    [
        ("0", ()),
        ("0.5", ("blocks.2.mlp.",)),
        ("1", ("blocks.2.",)),
        ("2", ("blocks.1.", "blocks.2.")),
        ("all", ("blocks.", "patch_embed.", "cls_token", "pos_embed")),
    ],
)
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_blocks_choose_the_trained_parameters(blocks, trained, pool):
    model = Classifier(replace(BASE, pool=pool))
    config = FinetuneConfig.from_flags(blocks=blocks)
    freeze_all_but_last_blocks(model, parse_num_blocks(blocks))
    always = ("head.", "fc_norm." if pool == "mean" else "norm.")
    rows = list_parameters(model, config)
    assert {r["name"] for r in rows if r["trained"]} == {
        r["name"] for r in rows if r["name"].startswith((*trained, *always))
    }
    assert all(r["lr"] == 0 for r in rows if not r["trained"])


@pytest.mark.parametrize("blocks", ["0", "0.5", "2", "all"])
def test_every_trained_parameter_is_in_one_group(blocks):
    model = Classifier(BASE)
    freeze_all_but_last_blocks(model, parse_num_blocks(blocks))
    groups = param_groups_layer_decay(model, 0.05, 0.75, DEPTH)
    held = [name for group in groups for name in group["names"]]
    assert sorted(held) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    parameters = dict(model.named_parameters())
    for group in groups:
        assert all(parameters[n] is p for n, p in zip(group["names"], group["params"], strict=True))


@pytest.mark.parametrize("blocks", ["0", "0.5", "1"])
def test_frozen_parameters_stay_and_others_change(run, tmp_path, blocks):
    tuned(run, tmp_path, blocks=blocks, weight_decay=0.3, ema=0.9)
    before, after = weights(run), weights(tmp_path / "ft")
    model = Classifier(BASE)
    freeze_all_but_last_blocks(model, float(blocks))
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(before[name], after[name]) != parameter.requires_grad, name


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_all_of_the_encoder_is_loaded_and_nothing_else(run, pool):
    model, theirs = Classifier(replace(BASE, pool=pool)), weights(run)
    load_encoder_into(model, run)
    state = model.state_dict()
    kept = {n for n in theirs if not n.startswith(("decoder", "mask_token"))}
    if pool == "mean":
        kept -= {"norm.weight", "norm.bias"}
    assert kept < state.keys()
    assert all(torch.equal(state[name], theirs[name]) for name in kept)
    fresh = state.keys() - kept
    assert fresh == {"head.weight", "head.bias"} | (
        {"fc_norm.weight", "fc_norm.bias"} if pool == "mean" else set()
    )


def test_a_weight_that_is_missing_or_left_over_is_named(run, tmp_path):
    file = checkpoint.find_newest(run / "checkpoints") / "model.safetensors"
    config = load(run).config
    for change in ({"surplus": torch.zeros(1)}, {"blocks.1.norm1.bias": None}):
        state = {k: v for k, v in {**load_file(file), **change}.items() if v is not None}
        checkpoint.save(tmp_path / "checkpoints", 1, {"model": state}, {"step": 1}, make_metadata(config))
        with pytest.raises(UserError, match=next(iter(change))):
            load_encoder_into(Classifier(BASE), tmp_path)


def test_position_embeddings_fit_another_image_size(run):
    model = Classifier(replace(BASE, image_size=(24, 32)))
    load_encoder_into(model, run)
    assert torch.equal(model.pos_embed, get_2d_sincos_pos_embed(32, (6, 8)))


def test_a_model_that_does_not_fit_is_refused(run):
    with pytest.raises(UserError, match="mae_vit_64x3x2_patch4"):
        load_encoder_into(Classifier(replace(BASE, model="mae_vit_64x3x2_patch4")), run)
    with pytest.raises(UserError, match=r"--cls-tokens 3 differs from the 1 of .*\. Remove --cls-tokens"):
        get_initial_config(FinetuneConfig.from_flags(run=str(run), cls_tokens=3))


def test_logits_equal_timms_with_the_same_weights(run, disturbed):
    import timm

    for pool, options in (("mean", {"global_pool": "avg"}), ("cls", {"global_pool": "token"})):
        model = disturbed(Classifier(replace(BASE, pool=pool))).eval()
        vit = timm.models.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=10,
            fc_norm=pool == "mean", norm_layer=None, **options,
        ).eval()  # fmt: skip
        vit.load_state_dict(model.state_dict())  # strict: the names are timm's
        for module in vit.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-6
        images = torch.randn(5, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(model(images), vit(images), atol=1e-5, rtol=1e-4)


def test_mean_pooling_excludes_the_cls_token(disturbed):
    model = disturbed(Classifier(BASE)).eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = model.encode(images)
    expected = model.head(model.fc_norm(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(model(images), expected)
    assert isinstance(model.norm, torch.nn.Identity)


# ---------------------------------------------------------------------- a run


def test_a_fine_tuned_run_can_be_loaded_and_has_results(run, tmp_path):
    result = tuned(run, tmp_path)
    assert result.accuracy == result.run.metrics["test_accuracy"]
    saved = json.loads((tmp_path / "ft" / "results" / "finetune.json").read_text())
    assert saved["results"]["accuracy"] == result.accuracy
    assert saved["data"]["train_images"] == 60
    model = load_classifier(tmp_path / "ft")
    assert model.config.classes == 10
    assert isinstance(load(tmp_path / "ft"), Classifier)
    with pytest.raises(UserError, match=r"cannot reconstruct images: its type is .*classifier"):
        load_autoencoder(tmp_path / "ft")


def test_accuracy_equals_that_of_the_loaded_model(run, tmp_path):
    result = tuned(run, tmp_path, steps=8, lr=3e-3)
    model, source = load_classifier(tmp_path / "ft"), open_source("shapes:40:seed=1:size=16", 3)
    images = to_float(torch.stack([source.image(i).pixels for i in range(40)]))
    with torch.no_grad():
        predicted = model(normalize(images, model.config.mean, model.config.std)).argmax(1)
    assert result.accuracy == sum(predicted[i] == source.label(i) for i in range(40)) / 40
    predictions = read_predictions(tmp_path / "ft")
    assert predictions.image_ids.tolist() == list(range(40))
    assert predictions.class_indices.tolist() == predicted.tolist()
    assert read_predictions(tmp_path) is None


def test_the_moving_average_is_evaluated_if_there_is_one(run, tmp_path):
    result = tuned(run, tmp_path, ema=0.97, steps=8, lr=3e-2)
    source = open_source("shapes:40:seed=1:size=16", 3)
    images = to_float(torch.stack([source.image(i).pixels for i in range(40)]))
    labels = torch.tensor([source.label(i) for i in range(40)])
    for name, average in (("test_accuracy", True), ("test_accuracy_last", False)):
        model = load_classifier(tmp_path / "ft", average)
        with torch.no_grad():
            predicted = model(normalize(images, model.config.mean, model.config.std)).argmax(1)
        assert result.run.metrics[name] == (predicted == labels).double().mean()
    assert result.run.metrics["test_accuracy"] != result.run.metrics["test_accuracy_last"]


def test_logits_are_float32_under_autocast(run):
    model = Classifier(BASE)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(2, 3, 16, 16)).dtype == torch.float32


@pytest.mark.parametrize("randaugment", [None, "rand-m9-mstd0.5-inc1"])
def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path, randaugment):
    options = {"randaugment": randaugment, "checkpoint_every": 3, "keep_checkpoints": 9, "steps": 6}
    tuned(run, tmp_path / "a", **options)
    tuned(run, tmp_path / "b", **options)
    doomed = tmp_path / "b" / "ft" / "checkpoints" / "step-00000006"
    doomed.rename(doomed.with_name(".removed-x"))
    tuned(run, tmp_path / "b", **options, workers=2)
    one, two = (weights(tmp_path / x / "ft") for x in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_run_does_not_need_its_initial_weights(run, tmp_path):
    moved = tmp_path / "start"
    shutil.copytree(run, moved)
    tuned(moved, tmp_path, checkpoint_every=2, keep_checkpoints=9)
    doomed = tmp_path / "ft" / "checkpoints" / "step-00000004"
    doomed.rename(doomed.with_name(".removed-x"))
    moved.rename(tmp_path / "gone")
    assert tuned(moved, tmp_path, checkpoint_every=2, keep_checkpoints=9).accuracy is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ("shapes:60:seed=3:size=16",)}, "train: the images differ"),
        ({"test": ("shapes:40:seed=3:size=16",)}, "--test has other images"),
        ({"smoothing": 0.2}, "smoothing: was 0.1, now 0.2"),
    ],
)
def test_a_run_resumes_only_with_the_same_images(run, tmp_path, change, message):
    tuned(run, tmp_path, checkpoint_every=2, keep_checkpoints=9)
    doomed = tmp_path / "ft" / "checkpoints" / "step-00000004"
    doomed.rename(doomed.with_name(".removed-x"))
    with pytest.raises(UserError, match=message):
        tuned(run, tmp_path, checkpoint_every=2, keep_checkpoints=9, **change)


def test_unreadable_test_images_are_reported_and_not_counted(run, tmp_path, capsys):
    listed = []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (16, 16), (i * 20, 0, 0)).save(path)
        listed.append(f"{path}\t{i % 3}")
    for i in (2, 5):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    (tmp_path / "list.txt").write_text("\n".join(listed))
    options = {"train": (str(tmp_path / "list.txt"),), "max_bad_samples": 0.5, "mixup": 0.0, "cutmix": 0.0}
    result = tuned(run, tmp_path, test=(str(tmp_path / "list.txt"),), **options)
    assert result.test_images == 10
    assert "2 test image(s) could not be read" in capsys.readouterr().out


def test_one_class_is_refused(run, tmp_path):
    images = np.zeros((20, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.zeros(20, np.int64))
    with pytest.raises(UserError, match=r"has images of one class only\. Give images of two classes or more"):
        tuned(run, tmp_path, train=(str(tmp_path / "x.npz"),), test=(str(tmp_path / "x.npz"),))


def test_a_missing_result_of_a_killed_run_is_written_on_resume(run, tmp_path):
    first = tuned(run, tmp_path)
    file = tmp_path / "ft" / "results" / "finetune.json"
    before = json.loads(file.read_text())
    file.unlink()
    assert tuned(run, tmp_path).accuracy == first.accuracy
    after = json.loads(file.read_text())
    assert after["results"] == before["results"]
    assert after["data"] == before["data"]


def test_labels_are_balanced_and_reproducible(run, tmp_path):
    result = tuned(run, tmp_path, labels=20)
    saved = json.loads((tmp_path / "ft" / "results" / "finetune.json").read_text())
    assert saved["data"]["train_images"] == 20
    assert result.run.step == 4


def test_scratch_uses_the_same_recipe(tmp_path):
    result = tuned("scratch", tmp_path, model="mae_vit_32x3x2_patch4", image_size=16)
    assert result.accuracy is not None
    with pytest.raises(UserError, match="scratch, so the network must be given"):
        tuned("scratch", tmp_path / "b")


def test_it_learns(tmp_path):
    """Fine-tuning learns to classify noisy images by their color."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 400), ("test", 100)):
        labels = np.arange(count) % 5
        colours = np.asarray([(90, 60, 60), (60, 90, 60), (60, 60, 90), (90, 90, 60), (60, 90, 90)])[labels]
        pixels = colours[:, None, None] + generator.normal(0, 30, (count, 16, 16, 3))
        images = pixels.clip(0, 255).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
    result = tuned(
        "scratch",
        tmp_path,
        train=(str(tmp_path / "train.npz"),),
        test=(str(tmp_path / "test.npz"),),
        model="mae_vit_32x3x2_patch4",
        image_size=16,
        steps=60,
        lr=3e-3,
        batch_size=50,
        layer_decay=1.0,
    )
    assert result.accuracy is not None
    assert result.accuracy > 0.8  # chance is 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "2.5"}, "--blocks is 2.5. Give all"),
        ({"blocks": "-1"}, "--blocks is -1. Give all"),
        ({"blocks": "most"}, "--blocks is most. Give all"),
        ({"blocks": "4"}, "--blocks is 4, and the model has 3 blocks"),
        ({"blocks": ("1", "2")}, "several values"),
        ({"layer_decay": 0.0}, "--layer-decay 0.0 is out of range"),
        ({"batch_size": 15}, "--batch-size is 15, but mixup and CutMix mix images in pairs"),
        ({"crop_min": 0.0}, "--crop-min 0.0 is out of range"),
        ({"randaugment": "strong"}, "rand-m9-mstd0.5-inc1"),
        ({"labels": 1}, "--labels 1 is out of range"),
        ({"smoothing": 1.0}, "--smoothing 1.0 is out of range"),
        ({"train": ()}, "--train is missing"),
        ({"crop_pct": 0.0}, "--crop-pct 0.0 is out of range"),
    ],
)
def test_invalid_flags_are_refused(run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        tuned(run, tmp_path, **options)


def test_randaugment_needs_rgb_images(tmp_path):
    network = {"model": "mae_vit_32x3x2_patch4", "image_size": 16, "in_chans": 1}
    with pytest.raises(UserError, match=r"RGB.*has 1 channel"):
        tuned("scratch", tmp_path, **network, randaugment="rand-m9-mstd0.5-inc1")
