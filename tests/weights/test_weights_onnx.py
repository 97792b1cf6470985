"""To ONNX: any number of images, the same outputs in ONNX Runtime, and no trace of this machine."""

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from weights_models import CLASSES, SIZES, autoencoder, classifier, pictures

from quarterview.weights import Facts, export_onnx

HERE = str(Path(__file__).resolve().parents[2])


def check(model, folder, facts=None):
    """Export and run, on batches of 1 and 3: the file's session."""
    file = folder / "mine.onnx"
    assert export_onnx(model, file, facts).largest < 1e-5
    assert [path.name for path in folder.iterdir()] == ["mine.onnx"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = pictures(model, count)
        with torch.no_grad():
            if model.__class__.__name__ == "Classifier":
                expected = {"logits": model(images)}
            else:
                tokens = model.encode(images)
                expected = {"tokens": tokens, "pooled": tokens[:, 1:].mean(dim=1)}
        found = session.run(list(expected), {"images": images.numpy()})
        for value, theirs in zip(expected.values(), found, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), value, rtol=0, atol=1e-5)
    return session


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_encoders_of_all_sizes(tmp_path, size):
    check(autoencoder(**SIZES[size]), tmp_path)


@pytest.mark.slow
def test_a_classifier_that_reads_cls(tmp_path):
    check(classifier(pool="cls"), tmp_path)


def test_an_encoder_and_its_metadata(tmp_path):
    facts = Facts(fingerprint="0123456789abcdef", licence="CC-BY-NC-4.0")
    session = check(autoencoder(), tmp_path, facts)
    assert [output.shape for output in session.get_outputs()] == [["batch", 5, 32], ["batch", 32]]
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["size"]) == [16, 16]
    assert json.loads(about["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(about["std"]) == [0.2, 0.25, 0.3]
    assert (about["interpolation"], about["crop_pct"]) == ("bicubic", "1.0")
    assert (about["data"], about["license"]) == ("0123456789abcdef", "CC-BY-NC-4.0")


def test_a_classifier_with_its_classes_and_no_paths(tmp_path):
    session = check(classifier(), tmp_path)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == list(CLASSES)
    content = (tmp_path / "mine.onnx").read_bytes()
    assert HERE.encode() not in content
    assert b"site-packages" not in content
    onnx.checker.check_model(tmp_path / "mine.onnx", full_check=True)
