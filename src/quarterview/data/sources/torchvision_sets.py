"""The public image sets that torchvision knows how to fetch and read.

Only those whose readers unpickle nothing; and CIFAR, whose files are pickles, by a reader of our own.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from quarterview.data.decode import from_pillow
from quarterview.data.sources.base import BadSampleError, Picture, digest
from quarterview.data.sources.cifar import read_cifar
from quarterview.errors import UserError, unknown


class _Opened(NamedTuple):
    image: Callable[[int], Image.Image]
    labels: list[int]
    classes: list[str] | None


class TorchvisionSource:
    """One split of a public set, under the folder `QUARTERVIEW_DATA`, else ``~/.cache/quarterview``.

    The set is fetched there if it is missing. Each process opens it itself, unless it was forked from
    one that had.

    Args:
        name: one of `SETS`, in upper or lower case.
        channels: how many channels the pictures shall have.
        split: one of the set's splits; by default the first of them, the one to train on.

    Raises:
        UserError: if there is no such set or split, or it is neither there nor can be fetched.
    """

    def __init__(self, name: str, channels: int, split: str | None = None) -> None:
        known = {accepted.lower(): accepted for accepted in SETS}
        if name.lower() not in known:
            raise unknown("torchvision set", name, SETS)
        self.set_name, self.channels = known[name.lower()], channels
        splits = SETS[self.set_name]
        self.split = next(iter(splits)) if split is None else split
        if self.split not in splits:
            raise unknown(f"split of {self.set_name}", self.split, splits)
        self._opened: _Opened | None = _opened(self.set_name, self.split, _root())
        self.classes: Sequence[str] | None = self._opened.classes
        self._count = len(self._opened.labels)

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def image(self, index: int) -> Picture:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about metadata
                image = self._set().image(index)
        except (UserError, IndexError):
            raise
        except Exception as error:  # Pillow raises nearly everything
            raise BadSampleError(f"cannot be decoded: {error}") from error
        return from_pillow(image, self.channels)

    def label(self, index: int) -> int | None:
        label = self._set().labels[index]
        return label if label >= 0 else None

    def name(self, index: int) -> str:
        return f"torchvision:{self.set_name}:{self.split} image {index}"

    def fingerprint(self) -> str:
        return digest("torchvision", self.set_name, self.split, self._count, *self._set().labels)

    def _set(self) -> _Opened:
        if self._opened is None:
            self._opened = _opened(self.set_name, self.split, _root())
        return self._opened


_TRAIN_OR_TEST = {"train": {"train": True}, "test": {"train": False}}


def _splits(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


SETS: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": _TRAIN_OR_TEST,
    "CIFAR100": _TRAIN_OR_TEST,
    "Country211": _splits("train", "valid", "test"),
    "DTD": _splits("train", "val", "test"),
    "EuroSAT": {"all": {}},
    "FashionMNIST": _TRAIN_OR_TEST,
    "FGVCAircraft": _splits("trainval", "train", "val", "test"),
    "Flowers102": _splits("train", "val", "test"),
    "Food101": _splits("train", "test"),
    "GTSRB": _splits("train", "test"),
    "Imagenette": _splits("train", "val"),
    "KMNIST": _TRAIN_OR_TEST,
    "MNIST": _TRAIN_OR_TEST,
    "OxfordIIITPet": _splits("trainval", "test"),
    "RenderedSST2": _splits("train", "val", "test"),
    "STL10": _splits("train", "test", "unlabeled", "train+unlabeled"),
    "SVHN": _splits("train", "test", "extra"),
    "USPS": _TRAIN_OR_TEST,
}
"""Every accepted set, with its splits and what its class in torchvision calls them."""


def _root() -> Path:
    return Path(os.environ.get("QUARTERVIEW_DATA") or Path.home() / ".cache" / "quarterview")


def _opened(name: str, split: str, root: Path) -> _Opened:
    options = SETS[name][split]
    read = _cifar if name.startswith("CIFAR") else _by_torchvision
    try:
        try:
            return read(name, options, root, False)
        except (OSError, RuntimeError):  # by one of these torchvision says that it is not there yet
            root.mkdir(parents=True, exist_ok=True)
            return read(name, options, root, True)
    except UserError:
        raise
    except Exception as error:  # of the network, the archive, the disk or the reader
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the set {name} is not in {root} and could not be fetched: {reason}; put it there as "
            "torchvision does, or let QUARTERVIEW_DATA name the folder that holds it"
        ) from error


def _by_torchvision(name: str, options: dict[str, Any], root: Path, download: bool) -> _Opened:
    from torchvision import datasets  # here, for it takes seconds to import

    dataset = getattr(datasets, name)(root=str(root), download=download, **options)
    names = getattr(dataset, "classes", None)
    classes = names and [entry if isinstance(entry, str) else ", ".join(entry) for entry in names]
    return _Opened(lambda index: dataset[index][0], _labels(dataset), classes)


def _labels(dataset: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return np.asarray(getattr(dataset, attribute)).tolist()
    return [label for _, label in dataset._samples]


def _cifar(name: str, options: dict[str, Any], root: Path, download: bool) -> _Opened:
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    known: Any = getattr(datasets, name)
    folder = root / known.base_folder
    files = [folder / file for file, _ in (known.train_list if options["train"] else known.test_list)]
    if download:
        download_and_extract_archive(known.url, str(root), filename=known.filename, md5=known.tgz_md5)
    names = folder / known.meta["filename"]
    for file in (*files, names):
        file.stat()  # before anything else fails of what is merely not there yet
    labels_key = "labels" if name == "CIFAR10" else "fine_labels"
    read = read_cifar(files, labels_key, names, known.meta["key"])
    channels_last = read.images.transpose(0, 2, 3, 1)
    return _Opened(lambda index: Image.fromarray(channels_last[index]), read.labels, read.classes)
