"""To torch.export: any number of images, the same outputs, and no trace of this machine."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from weights_models import SIZES, autoencoder, classifier, pictures

from quarterview.weights import export_torch_export

HERE = str(Path(__file__).resolve().parents[2])
# torch's own reader makes a tensor of a buffer that cannot be written to
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


def check(model, folder):
    file = folder / "mine.pt2"
    assert export_torch_export(model, file).largest < 1e-5
    assert [path.name for path in folder.iterdir()] == ["mine.pt2"]
    program = torch.export.load(file).module()
    for count in (1, 3):
        images = pictures(model, count)
        with torch.no_grad():
            found = program(images)
            expected = model(images) if model.__class__.__name__ == "Classifier" else model.encode(images)
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
        if len(found) == 2:
            torch.testing.assert_close(found[1], expected[:, 1:].mean(dim=1), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_encoders_of_all_sizes(tmp_path, size):
    check(autoencoder(**SIZES[size]), tmp_path)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_classifier(tmp_path, pool):
    check(classifier(pool=pool), tmp_path)


def test_an_encoder_how_pictures_are_prepared_and_no_paths(tmp_path):
    model = autoencoder()
    check(model, tmp_path)
    about = {"quarterview.json": ""}
    torch.export.load(tmp_path / "mine.pt2", extra_files=about)
    wanted = json.loads(about["quarterview.json"])
    assert (wanted["size"], wanted["mean"], wanted["std"]) == ([16, 16], [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    with zipfile.ZipFile(tmp_path / "mine.pt2") as archive:
        for name in archive.namelist():
            assert HERE.encode() not in archive.read(name), name
            assert b"site-packages" not in archive.read(name), name
