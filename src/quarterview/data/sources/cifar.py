"""CIFAR-10 and CIFAR-100 in their original form, without the powers of pickle.

Their files are pickles, and to load a pickle is to run whatever it asks for. This reader knows strings,
numbers, lists and dictionaries, and for an array it makes a note of what the file says of it.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quarterview.errors import UserError


class Cifar(NamedTuple):
    """One split: `images` uint8 [N, 3, 32, 32], `labels` of each, and the names of the classes."""

    images: np.ndarray
    labels: list[int]
    classes: list[str]


def read_cifar(batches: list[Path], labels_key: str, names: Path, names_key: str) -> Cifar:
    """Read the batches of one split, and the file with the names of the classes.

    Raises:
        UserError: if a file is missing, damaged, or holds anything but what such files hold.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in batches:
        batch = _dictionary(path)
        rows = _rows(batch.get("data"))
        given: Any = batch.get(labels_key)
        if rows is None or not _is_list(given, int) or len(given) != len(rows):
            raise UserError(
                f"{path} is no batch of CIFAR: it needs data, uint8 [N, 3072], and {labels_key} [N]"
            )
        images.append(rows.reshape(-1, 3, 32, 32))
        labels.extend(given)
    classes: Any = _dictionary(names).get(names_key)
    if not _is_list(classes, str):
        raise UserError(f"{names} does not name the classes of CIFAR: it needs a list {names_key}")
    return Cifar(np.concatenate(images), labels, classes)


class _Noted:
    """In the place of an array or a type of numbers: remembers what it was made with, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Noted,
    ("numpy._core.multiarray", "_reconstruct"): _Noted,
    ("numpy", "ndarray"): _Noted,
    ("numpy", "dtype"): _Noted,
    ("_codecs", "encode"): str.encode,  # how Python 3 writes bytes for Python 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]


def _dictionary(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # damaged pickles raise nearly everything
        raise UserError(
            f"cannot read {path} as part of CIFAR: {error}; delete it to have it fetched anew"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no part of CIFAR: it needs a dictionary")
    return content


def _rows(noted: Any) -> np.ndarray | None:
    """uint8 [N, 3072], or None if that is not what was noted."""
    match noted:
        case _Noted(
            state=(_, (int(count), 3072), _Noted(arguments=("u1", *_)), by_column, str() | bytes() as data)
        ):
            content = data.encode("latin1") if isinstance(data, str) else data
            if len(content) == count * 3072:
                return np.frombuffer(content, np.uint8).reshape(
                    (count, 3072), order="F" if by_column else "C"
                )
    return None


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
