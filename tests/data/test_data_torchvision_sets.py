import bz2
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quarterview.data.sources.torchvision_sets import DATASETS, TorchvisionSource
from quarterview.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QUARTERVIEW_DATA", str(tmp_path))
    return tmp_path


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)


def write_cifar10(root: Path, **more: object) -> np.ndarray:
    """Write the folder of the unpacked archive, two images per batch, and return the training images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    data = random_bytes(12, 3072)
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = data[2 * index : 2 * index + 2]
        (folder / name).write_bytes(
            pickle.dumps({"data": rows, "labels": [index, 9 - index], **more}, protocol=2)
        )
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return data[:10].reshape(10, 3, 32, 32)


def test_cifar10(root):
    images = write_cifar10(root)
    source = TorchvisionSource("CIFAR10", 3)
    assert len(source) == 10
    assert [source.label(i) for i in range(10)] == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert all(np.array_equal(source.image(i).pixels, images[i]) for i in range(10))
    assert source.classes == [f"class {i}" for i in range(10)]
    assert source.name(3) == "torchvision:CIFAR10:train image 3"
    assert len(TorchvisionSource("CIFAR10", 3, "test")) == 2


def test_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir()
    data = random_bytes(3, 3072)
    for name in ("train", "test"):
        batch = {"data": data, "fine_labels": [99, 0, 5], "coarse_labels": [1, 1, 1]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a"] * 100}, protocol=2))
    source = TorchvisionSource("CIFAR100", 3, "test")
    assert [source.label(i) for i in range(3)] == [99, 0, 5]
    assert np.array_equal(source.image(2).pixels, data[2].reshape(3, 32, 32))


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_hostile_cifar_executes_nothing(root):
    write_cifar10(root, filenames=Hostile(root / "executed"))
    with pytest.raises(UserError, match=r"data_batch_1 .* it refers to posix\.system"):
        TorchvisionSource("CIFAR10", 3)
    assert not (root / "executed").exists()


def write_mnist(root: Path) -> np.ndarray:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = random_bytes(5, 28, 28)
    for prefix in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, 5, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, 5) + bytes([3, 1, 4, 1, 5])
        )
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_mnist(root, channels):
    images = write_mnist(root)
    source = TorchvisionSource("MNIST", channels, "test")
    assert np.array_equal(source.image(3).pixels, np.stack([images[3]] * channels))
    assert [source.label(i) for i in range(5)] == [3, 1, 4, 1, 5]
    assert source.classes is not None
    assert source.classes[3] == "3 - three"


def test_usps_has_no_class_names(root):
    line = " ".join(["10", *(f"{i}:{-1.0}" for i in range(1, 257))])
    (root / "usps.bz2").write_bytes(bz2.compress(f"{line}\n".encode()))
    source = TorchvisionSource("USPS", 1)
    assert (source.label(0), source.classes) == (9, None)
    assert source.image(0).pixels.shape == (1, 16, 16)


def write_dtd(root: Path) -> None:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    (folder / "labels" / "train1.txt").write_text("woven/a.png\nbanded/b.png\n")
    for level, name in enumerate(("woven/a.png", "banded/b.png")):
        (folder / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 3), (level, 0, 0)).save(folder / "images" / name)


def test_sets_of_image_files(root):
    write_dtd(root)
    source = TorchvisionSource("DTD", 3)
    assert source.classes == ["banded", "woven"]
    assert [source.label(i) for i in range(2)] == [1, 0]
    assert [int(source.image(i).pixels[0, 0, 0]) for i in range(2)] == [0, 1]


def test_the_pickled_source_does_not_contain_images(root):
    images = write_mnist(root)
    source = TorchvisionSource("MNIST", 1)
    text = pickle.dumps(source)
    assert len(text) < 1500
    copy = pickle.loads(text)
    assert np.array_equal(copy.image(4).pixels[0], images[4])
    assert copy.fingerprint() == source.fingerprint() != TorchvisionSource("MNIST", 1, "test").fingerprint()


def test_unknown_sets_and_splits():
    with pytest.raises(UserError, match="Did you mean 'CIFAR10'"):
        TorchvisionSource("CIFAR11", 3)
    with pytest.raises(UserError, match=r"Unknown split of STL10 'unlabelled'.*'unlabeled'"):
        TorchvisionSource("stl10", 3, "unlabelled")


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "DTD"])
def test_a_missing_data_set_that_cannot_be_downloaded(root, monkeypatch, name):
    (root / "file").write_text("no folder")
    monkeypatch.setenv("QUARTERVIEW_DATA", str(root / "file" / "data"))  # nothing can be written there
    with pytest.raises(
        UserError, match=f"The data set {name} is not in .*file/data, and the download failed: "
    ):
        TorchvisionSource(name, 3)


def test_every_set_is_one_of_torchvision():
    datasets = pytest.importorskip("torchvision.datasets")
    assert all(hasattr(datasets, name) for name in DATASETS)
    assert all(splits for splits in DATASETS.values())
