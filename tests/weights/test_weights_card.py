"""Model cards state how weights were trained, and inherit the license of the base model."""

import json

import pytest
import torch
import yaml
from weights_models import CLASSES, autoencoder, classifier

from quarterview.commands.config import PretrainConfig
from quarterview.commands.pretrain import pretrain
from quarterview.weights import ModelInfo, export_safetensors, export_timm, read_model_info
from quarterview.weights.export.model_card import make_model_card
from quarterview.weights.export.safetensors import describe_format
from quarterview.weights.facts import flatten_settings, select_card_settings

TINY = {
    "model": "mae_vit_32x2x2_patch4",
    "image_size": 16,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "precision": "fp32",
    "device": "cpu",
    "batch_size": 16,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that started from the weights of another run, with results of k-NN and linear probes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    first = {"data": ("shapes:200:size=16",), "out": str(folder / "first"), "steps": 2}
    pretrain(PretrainConfig.from_flags(**first, **TINY))
    second = {"data": ("shapes:120:size=16",), "out": str(folder / "second"), "steps": 3, "ema": 0.9}
    second["shard_cache_dir"] = str(folder / "cache")
    pretrain(PretrainConfig.from_flags(**second, **TINY, init_from=str(folder / "first")))
    results = folder / "second" / "results"
    results.mkdir()
    weights = "checkpoints/step-00000003/model.safetensors"
    contents = {
        "knn": {"accuracies": [{"features": "this model", "k": 20, "vote": "weighted", "accuracy": 0.25}]},
        "linear": {"accuracies": {"this model": {"accuracy": 0.5}, "raw pixels": {"accuracy": 0.375}}},
        "linear-older": {"accuracies": {"this model": {"accuracy": 0.99}}},
    }
    for name, found in contents.items():
        of = weights.replace("3", "2") if name == "linear-older" else weights
        (results / f"{name}.json").write_text(json.dumps({"settings": {"weights": of}, "results": found}))
    return folder / "second"


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_model_info_of_a_run_and_of_its_base_model(run):
    info = read_model_info(run)
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert (info.name, info.steps, info.num_images, info.is_ema) == ("second", 3, 120, False)
    assert info.fingerprint == record["data"]["fingerprint"]
    assert info.settings["mask_ratio"] == 0.75
    assert not {"out", "data", "init_from", "device", "log_every", "shard_cache_dir"} & info.settings.keys()
    assert "loss" in info.losses
    assert info.accuracies == {
        "knn, k 20, weighted: this model": 0.25,
        "linear: this model": 0.5,
        "linear: raw pixels": 0.375,
    }
    assert info.base_model == "first"
    assert info.base_model_info is not None
    assert (
        info.base_model_info.steps,
        info.base_model_info.num_images,
        info.base_model_info.base_model_info,
    ) == (2, 200, None)
    average = read_model_info(run, ema=True)
    assert average.is_ema
    assert not average.accuracies  # the results belong to the weights, not to their moving average


def test_model_card_of_a_run(run, tmp_path):
    model = autoencoder()
    export_timm(model, tmp_path, read_model_info(run))
    text = (tmp_path / "README.md").read_text("utf-8")
    for words in (
        "# second",
        'timm.create_model("local-dir:FOLDER", pretrained=True)',
        "| size | 16 × 16 pixels, 3 channels |",
        "| mean | 0.4 0.5 0.6 |",
        "| std | 0.2 0.25 0.3 |",
        "bicubic",
        "3 updates",
        read_model_info(run).fingerprint,
        "| started from | first |",
        "| … started from | random weights |",
        "| linear: this model | 50.0% |",
        "mask_ratio: 0.75",
        "whose license is not recorded",
        "Largest difference",
    ):
        assert words in text, words
    assert str(run.parent) not in text  # no paths of this machine
    assert header(text)["library_name"] == "timm"
    assert header(text)["pipeline_tag"] == "image-feature-extraction"
    assert "license" not in header(text)


def test_nested_and_flat_configurations_give_the_same_card_settings():
    flat = {
        "model": "mae_vit_base_patch16",
        "method": "mae",
        "mask_ratio": 0.75,
        "lr": None,
        "out": "/home/me/run",
        "device": "cuda",
        "shard_cache_dir": "/home/me/cache",
        "log_every": 20,
        "init_from": "/home/me/first",
    }
    nested = {
        "run": {"out": "/home/me/run", "log_every": 20},
        "compute": {"device": "cuda"},
        "data": {"shard_cache_dir": "/home/me/cache"},
        "model": {"model": "mae_vit_base_patch16"},
        "method": {"name": "mae", "mask_ratio": 0.75},
        "optim": {"lr": None},
        "init": {"init_from": "/home/me/first"},
    }
    assert flatten_settings(nested) == flatten_settings(flat) == flat
    shown = {"model": "mae_vit_base_patch16", "method": "mae", "mask_ratio": 0.75}
    assert select_card_settings(flatten_settings(nested)) == select_card_settings(flat) == shown


def test_a_deleted_base_model_is_named_without_its_folder(run):
    first = run.parent / "first"
    moved = first.rename(run.parent / "moved")
    try:
        info = read_model_info(run)
    finally:
        moved.rename(first)
    assert (info.base_model, info.base_model_info) == ("first", None)


def test_the_license_of_the_base_model_is_inherited(run, tmp_path):
    record = run.parent / "first" / "run.json"
    before = record.read_text("utf-8")
    try:
        record.write_text(json.dumps({**json.loads(before), "licence": "CC-BY-NC-4.0"}))
        assert read_model_info(run).license == "CC-BY-NC-4.0"
        assert read_model_info(run, license="MIT").license == "MIT"
        export_timm(autoencoder(), tmp_path, read_model_info(run))
    finally:
        record.write_text(before)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert header(text)["license"] == "cc-by-nc-4.0"
    assert "## License\n\nCC-BY-NC-4.0." in text
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["license"] == "CC-BY-NC-4.0"


def test_free_text_license_and_special_characters_in_class_names():
    model = classifier()
    info = ModelInfo(license="Ours: all rights reserved")
    text = make_model_card(model, describe_format(model), info, {"logits": 0.0}, {"torch": "2"})
    assert header(text)["license"] == "other"
    assert header(text)["license_name"] == "Ours: all rights reserved"
    assert f"| classes | {', '.join(CLASSES)} |".replace("naïve | ox", "naïve \\| ox") in text
    assert "3 classes, from the mean of the patch tokens" in text


def test_weights_without_any_record(tmp_path):
    file = tmp_path / "alone.safetensors"
    export_safetensors(autoencoder(mean=None, std=None), file)
    info = read_model_info(file)
    assert info == ModelInfo(name="alone")
    export_timm(autoencoder(mean=None, std=None), tmp_path / "out", info)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| training | not recorded with these weights |" in text
    assert "mean, std | not recorded with these weights" in text
