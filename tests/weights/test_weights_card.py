"""The card says where weights come from, and carries their licence along."""

import json

import pytest
import torch
import yaml
from weights_models import CLASSES, autoencoder, classifier

from quarterview.commands.config import PretrainConfig
from quarterview.commands.pretrain import pretrain
from quarterview.weights import Facts, export_safetensors, export_timm, facts_of
from quarterview.weights.export.model_card import card
from quarterview.weights.export.safetensors import target
from quarterview.weights.facts import flat_settings, shown_settings

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
    """A run that went on from another, with the results of a probe beside it."""
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


def test_the_facts_of_a_run_and_of_the_one_before_it(run):
    facts = facts_of(run)
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert (facts.name, facts.steps, facts.images, facts.average) == ("second", 3, 120, False)
    assert facts.fingerprint == record["data"]["fingerprint"]
    assert facts.settings["mask_ratio"] == 0.75
    assert not {"out", "data", "init_from", "device", "log_every", "shard_cache_dir"} & facts.settings.keys()
    assert "loss" in facts.losses
    assert facts.accuracies == {
        "knn, k 20, weighted: this model": 0.25,
        "linear: this model": 0.5,
        "linear: raw pixels": 0.375,
    }
    assert facts.started_from == "first"
    assert facts.start is not None
    assert (facts.start.steps, facts.start.images, facts.start.start) == (2, 200, None)
    average = facts_of(run, ema=True)
    assert average.average
    assert not average.accuracies  # those were of the weights


def test_the_card_of_a_run(run, tmp_path):
    model = autoencoder()
    export_timm(model, tmp_path, facts_of(run))
    text = (tmp_path / "README.md").read_text("utf-8")
    for words in (
        "# second",
        'timm.create_model("local-dir:FOLDER", pretrained=True)',
        "| size | 16 × 16 pixels, 3 channels |",
        "| mean | 0.4 0.5 0.6 |",
        "| std | 0.2 0.25 0.3 |",
        "bicubic",
        "3 updates",
        facts_of(run).fingerprint,
        "| started from | first |",
        "| … started from | random weights |",
        "| linear: this model | 50.0% |",
        "mask_ratio: 0.75",
        "whose licence is not recorded",
        "Largest difference",
    ):
        assert words in text, words
    assert str(run.parent) not in text  # no places of this machine
    assert header(text)["library_name"] == "timm"
    assert header(text)["pipeline_tag"] == "image-feature-extraction"
    assert "license" not in header(text)


def test_a_configuration_by_parts_is_shown_as_a_flat_one_is():
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
    assert flat_settings(nested) == flat_settings(flat) == flat
    shown = {"model": "mae_vit_base_patch16", "method": "mae", "mask_ratio": 0.75}
    assert shown_settings(flat_settings(nested)) == shown_settings(flat) == shown


def test_what_a_run_started_from_is_named_without_its_folder_though_it_is_gone(run):
    first = run.parent / "first"
    moved = first.rename(run.parent / "moved")
    try:
        facts = facts_of(run)
    finally:
        moved.rename(first)
    assert (facts.started_from, facts.start) == ("first", None)


def test_the_licence_is_carried_along(run, tmp_path):
    record = run.parent / "first" / "run.json"
    before = record.read_text("utf-8")
    try:
        record.write_text(json.dumps({**json.loads(before), "licence": "CC-BY-NC-4.0"}))
        assert facts_of(run).licence == "CC-BY-NC-4.0"
        assert facts_of(run, licence="MIT").licence == "MIT"
        export_timm(autoencoder(), tmp_path, facts_of(run))
    finally:
        record.write_text(before)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert header(text)["license"] == "cc-by-nc-4.0"
    assert "## Licence\n\nCC-BY-NC-4.0." in text
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["license"] == "CC-BY-NC-4.0"


def test_a_licence_in_words_and_class_names_with_signs_do_no_harm():
    model = classifier()
    facts = Facts(licence="Ours: all rights reserved")
    text = card(model, target(model), facts, {"logits": 0.0}, {"torch": "2"})
    assert header(text)["license"] == "other"
    assert header(text)["license_name"] == "Ours: all rights reserved"
    assert f"| classes | {', '.join(CLASSES)} |".replace("naïve | ox", "naïve \\| ox") in text
    assert "3 classes, read from the mean of the patch tokens" in text


def test_weights_of_which_nothing_is_known(tmp_path):
    file = tmp_path / "alone.safetensors"
    export_safetensors(autoencoder(mean=None, std=None), file)
    facts = facts_of(file)
    assert facts == Facts(name="alone")
    export_timm(autoencoder(mean=None, std=None), tmp_path / "out", facts)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| training | not recorded with these weights |" in text
    assert "mean, std | not recorded with these weights" in text
