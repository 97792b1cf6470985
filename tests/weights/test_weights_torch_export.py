"""Export with torch.export: dynamic batch size, equal outputs, no paths of this machine."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from weights_models import SIZES, autoencoder, classifier, random_images

from quarterview.weights import export_torch_export

REPOSITORY = str(Path(__file__).resolve().parents[2])
# torch.export.load creates a tensor from a read-only buffer
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


def export_and_check(model, folder):
    file = folder / "mine.pt2"
    assert export_torch_export(model, file).max_difference < 1e-5
    assert [path.name for path in folder.iterdir()] == ["mine.pt2"]
    program = torch.export.load(file).module()
    for count in (1, 3):
        images = random_images(model, count)
        with torch.no_grad():
            actual = program(images)
            expected = model(images) if model.__class__.__name__ == "Classifier" else model.encode(images)
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-5)
        if len(actual) == 2:
            torch.testing.assert_close(actual[1], expected[:, 1:].mean(dim=1), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_export_encoders_of_all_sizes(tmp_path, size):
    export_and_check(autoencoder(**SIZES[size]), tmp_path)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_export_a_classifier(tmp_path, pool):
    export_and_check(classifier(pool=pool), tmp_path)


def test_preprocessing_is_in_the_file_and_paths_are_not(tmp_path):
    model = autoencoder()
    export_and_check(model, tmp_path)
    about = {"quarterview.json": ""}
    torch.export.load(tmp_path / "mine.pt2", extra_files=about)
    preprocessing = json.loads(about["quarterview.json"])
    assert (preprocessing["size"], preprocessing["mean"], preprocessing["std"]) == (
        [16, 16],
        [0.4, 0.5, 0.6],
        [0.2, 0.25, 0.3],
    )
    with zipfile.ZipFile(tmp_path / "mine.pt2") as archive:
        for name in archive.namelist():
            assert REPOSITORY.encode() not in archive.read(name), name
            assert b"site-packages" not in archive.read(name), name
