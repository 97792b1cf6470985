"""Export to one safetensors file: bit-equal weights, and a header that describes the model."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from weights_models import autoencoder, classifier

import quarterview as qv
from quarterview.weights import ModelInfo, export_safetensors
from quarterview.weights.loading import load_classifier


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_an_autoencoder_is_loaded_unchanged(tmp_path):
    model, file = autoencoder(image_size=(16, 32), in_chans=3), tmp_path / "new" / "mine.safetensors"
    result = export_safetensors(model, file)
    assert (result.path, result.max_difference) == (file, 0.0)
    assert [path.name for path in file.parent.iterdir()] == ["mine.safetensors"]
    again = qv.load(file)
    assert again.config == model.config
    assert_equal_weights(again.state_dict(), model.state_dict())
    assert_equal_weights(load_file(file), model.state_dict())


def test_a_classifier_is_loaded_unchanged(tmp_path):
    model, file = classifier(), tmp_path / "mine.safetensors"
    export_safetensors(model, file)
    export_safetensors(model, file)  # replaces the existing file
    again = load_classifier(file)
    assert again.config == model.config
    assert_equal_weights(again.state_dict(), model.state_dict())


def test_the_header_has_the_configuration_and_the_license(tmp_path):
    export_safetensors(autoencoder(), tmp_path / "a", ModelInfo(license="CC-BY-NC-4.0"))
    with safe_open(tmp_path / "a", "pt") as file:
        header = file.metadata()
    assert header["license"] == "CC-BY-NC-4.0"
    assert json.loads(header["quarterview"])["config"]["model"] == "mae_vit_32x2x2_patch8"
