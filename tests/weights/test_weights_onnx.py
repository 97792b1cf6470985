"""Export to ONNX: dynamic batch size, equal outputs in ONNX Runtime, no paths of this machine."""

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from weights_models import CLASSES, SIZES, autoencoder, classifier, random_images

from quarterview.weights import ModelInfo, export_onnx

REPOSITORY = str(Path(__file__).resolve().parents[2])


def export_and_check(model, folder, info=None):
    """Export a model, compare the outputs for batches of 1 and 3, and return the ONNX Runtime session."""
    file = folder / "mine.onnx"
    assert export_onnx(model, file, info).max_difference < 1e-5
    assert [path.name for path in folder.iterdir()] == ["mine.onnx"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = random_images(model, count)
        with torch.no_grad():
            if model.__class__.__name__ == "Classifier":
                expected = {"logits": model(images)}
            else:
                tokens = model.encode(images)
                expected = {"tokens": tokens, "pooled": tokens[:, 1:].mean(dim=1)}
        actual = session.run(list(expected), {"images": images.numpy()})
        for value, theirs in zip(expected.values(), actual, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), value, rtol=0, atol=1e-5)
    return session


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_export_encoders_of_all_sizes(tmp_path, size):
    export_and_check(autoencoder(**SIZES[size]), tmp_path)


@pytest.mark.slow
def test_export_a_classifier_with_cls_pooling(tmp_path):
    export_and_check(classifier(pool="cls"), tmp_path)


def test_metadata_of_an_encoder(tmp_path):
    info = ModelInfo(fingerprint="0123456789abcdef", license="CC-BY-NC-4.0")
    session = export_and_check(autoencoder(), tmp_path, info)
    assert [output.shape for output in session.get_outputs()] == [["batch", 5, 32], ["batch", 32]]
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["size"]) == [16, 16]
    assert json.loads(about["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(about["std"]) == [0.2, 0.25, 0.3]
    assert (about["interpolation"], about["crop_pct"]) == ("bicubic", "1.0")
    assert (about["data"], about["license"]) == ("0123456789abcdef", "CC-BY-NC-4.0")


def test_class_names_are_in_the_metadata_and_paths_are_not(tmp_path):
    session = export_and_check(classifier(), tmp_path)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == list(CLASSES)
    content = (tmp_path / "mine.onnx").read_bytes()
    assert REPOSITORY.encode() not in content
    assert b"site-packages" not in content
    onnx.checker.check_model(tmp_path / "mine.onnx", full_check=True)
