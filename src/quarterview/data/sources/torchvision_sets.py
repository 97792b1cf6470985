"""Read the public image data sets that torchvision can download.

Supported are data sets whose torchvision readers unpickle nothing, and CIFAR. CIFAR's files are pickles,
which `cifar` reads without executing anything.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from quarterview.data.decode import convert_pillow_image
from quarterview.data.sources.base import BadSampleError, DecodedImage, compute_digest
from quarterview.data.sources.cifar import read_cifar
from quarterview.errors import UserError, unknown


class _LoadedDataset(NamedTuple):
    """A split of a data set: a function that returns an image, the labels, and the class names."""

    get_image: Callable[[int], Image.Image]
    labels: list[int]
    classes: list[str] | None


class TorchvisionSource:
    """A data source of one split of a torchvision data set.

    The data set is read from the folder in the environment variable `QUARTERVIEW_DATA`, by default
    ``~/.cache/quarterview``, and downloaded to it if it is missing. Each process opens it anew, unless it was
    forked from a process that had opened it.

    Args:
        name: a name in `DATASETS`, in upper or lower case.
        channels: number of channels of the images that are returned.
        split: a split of the data set; None for the first in `DATASETS`, which is for training.

    Raises:
        UserError: if there is no such data set or split, or it is missing and cannot be downloaded.
    """

    def __init__(self, name: str, channels: int, split: str | None = None) -> None:
        names = {accepted.lower(): accepted for accepted in DATASETS}
        if name.lower() not in names:
            raise unknown("torchvision data set", name, DATASETS)
        self.dataset_name, self.channels = names[name.lower()], channels
        splits = DATASETS[self.dataset_name]
        self.split = next(iter(splits)) if split is None else split
        if self.split not in splits:
            raise unknown(f"split of {self.dataset_name}", self.split, splits)
        self._loaded: _LoadedDataset | None = _load(self.dataset_name, self.split, _get_root())
        self.classes: Sequence[str] | None = self._loaded.classes
        self._num_images = len(self._loaded.labels)

    def __len__(self) -> int:
        return self._num_images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}

    def image(self, index: int) -> DecodedImage:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns about metadata
                image = self._get_dataset().get_image(index)
        except (UserError, IndexError):
            raise
        except Exception as error:  # Pillow raises many types on a broken file
            raise BadSampleError(f"cannot be decoded: {error}") from error
        return convert_pillow_image(image, self.channels)

    def label(self, index: int) -> int | None:
        label = self._get_dataset().labels[index]
        return label if label >= 0 else None

    def name(self, index: int) -> str:
        return f"torchvision:{self.dataset_name}:{self.split} image {index}"

    def fingerprint(self) -> str:
        return compute_digest(
            "torchvision", self.dataset_name, self.split, self._num_images, *self._get_dataset().labels
        )

    def _get_dataset(self) -> _LoadedDataset:
        if self._loaded is None:
            self._loaded = _load(self.dataset_name, self.split, _get_root())
        return self._loaded


_TRAIN_OR_TEST = {"train": {"train": True}, "test": {"train": False}}


def _make_splits(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


DATASETS: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": _TRAIN_OR_TEST,
    "CIFAR100": _TRAIN_OR_TEST,
    "Country211": _make_splits("train", "valid", "test"),
    "DTD": _make_splits("train", "val", "test"),
    "EuroSAT": {"all": {}},
    "FashionMNIST": _TRAIN_OR_TEST,
    "FGVCAircraft": _make_splits("trainval", "train", "val", "test"),
    "Flowers102": _make_splits("train", "val", "test"),
    "Food101": _make_splits("train", "test"),
    "GTSRB": _make_splits("train", "test"),
    "Imagenette": _make_splits("train", "val"),
    "KMNIST": _TRAIN_OR_TEST,
    "MNIST": _TRAIN_OR_TEST,
    "OxfordIIITPet": _make_splits("trainval", "test"),
    "RenderedSST2": _make_splits("train", "val", "test"),
    "STL10": _make_splits("train", "test", "unlabeled", "train+unlabeled"),
    "SVHN": _make_splits("train", "test", "extra"),
    "USPS": _TRAIN_OR_TEST,
}
"""The supported data sets: for each split, the arguments of the torchvision class."""


def _get_root() -> Path:
    return Path(os.environ.get("QUARTERVIEW_DATA") or Path.home() / ".cache" / "quarterview")


def _load(name: str, split: str, root: Path) -> _LoadedDataset:
    options = DATASETS[name][split]
    load = _load_cifar if name.startswith("CIFAR") else _load_with_torchvision
    try:
        try:
            return load(name, options, root, False)
        except (OSError, RuntimeError):  # torchvision raises one of these if the data set is missing
            root.mkdir(parents=True, exist_ok=True)
            return load(name, options, root, True)
    except UserError:
        raise
    except Exception as error:  # of the network, the archive, the disk or the reader
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The data set {name} is not in {root}, and the download failed: {reason}. Put it there in "
            "torchvision's layout, or set QUARTERVIEW_DATA to the folder that contains it."
        ) from error


def _load_with_torchvision(name: str, options: dict[str, Any], root: Path, download: bool) -> _LoadedDataset:
    from torchvision import datasets  # here, because the import takes seconds

    dataset = getattr(datasets, name)(root=str(root), download=download, **options)
    names = getattr(dataset, "classes", None)
    classes = names and [entry if isinstance(entry, str) else ", ".join(entry) for entry in names]
    return _LoadedDataset(lambda index: dataset[index][0], _get_labels(dataset), classes)


def _get_labels(dataset: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return np.asarray(getattr(dataset, attribute)).tolist()
    return [label for _, label in dataset._samples]


def _load_cifar(name: str, options: dict[str, Any], root: Path, download: bool) -> _LoadedDataset:
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    dataset_class: Any = getattr(datasets, name)
    folder = root / dataset_class.base_folder
    files = [
        folder / file
        for file, _ in (dataset_class.train_list if options["train"] else dataset_class.test_list)
    ]
    if download:
        download_and_extract_archive(
            dataset_class.url, str(root), filename=dataset_class.filename, md5=dataset_class.tgz_md5
        )
    names = folder / dataset_class.meta["filename"]
    for file in (*files, names):
        file.stat()  # raises FileNotFoundError if the data set is missing, which starts the download
    labels_key = "labels" if name == "CIFAR10" else "fine_labels"
    data = read_cifar(files, labels_key, names, dataset_class.meta["key"])
    channels_last = data.images.transpose(0, 2, 3, 1)
    return _LoadedDataset(lambda index: Image.fromarray(channels_last[index]), data.labels, data.classes)
