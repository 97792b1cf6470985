"""Read the original files of CIFAR-10 and CIFAR-100 safely.

They are pickles, and loading a pickle can run any code. This reader allows strings, numbers, lists and
dictionaries; in place of an array it creates a placeholder that records the array's parameters.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quarterview.errors import UserError, unreadable

_FIX = "Delete it to download it again."


class CifarSplit(NamedTuple):
    """One split of CIFAR: `images` uint8 [N, 3, 32, 32], the label of each, and the class names."""

    images: np.ndarray
    labels: list[int]
    classes: list[str]


def read_cifar(batches: list[Path], labels_key: str, names: Path, names_key: str) -> CifarSplit:
    """Read the batches of one split, and the file with the class names.

    Raises:
        UserError: if a file is missing or damaged, or contains anything else.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in batches:
        batch = _load_dict(path)
        rows = _to_array(batch.get("data"))
        batch_labels: Any = batch.get(labels_key)
        if rows is None or not _is_list_of(batch_labels, int) or len(batch_labels) != len(rows):
            raise UserError(
                f"{path} is no batch of CIFAR: it needs data, uint8 [N, 3072], and {labels_key} [N]. {_FIX}"
            )
        images.append(rows.reshape(-1, 3, 32, 32))
        labels.extend(batch_labels)
    classes: Any = _load_dict(names).get(names_key)
    if not _is_list_of(classes, str):
        raise UserError(f"{names} has no list {names_key} of the classes of CIFAR. {_FIX}")
    return CifarSplit(np.concatenate(images), labels, classes)


class _Placeholder:
    """Stands for an array or a dtype: records the arguments it is created with, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Placeholder,
    ("numpy._core.multiarray", "_reconstruct"): _Placeholder,
    ("numpy", "ndarray"): _Placeholder,
    ("numpy", "dtype"): _Placeholder,
    ("_codecs", "encode"): str.encode,  # how Python 3 pickles bytes for Python 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _ALLOWED[module, name]


def _load_dict(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # damaged pickles raise errors of many types
        raise unreadable(f"{path} as a file of CIFAR", error, _FIX) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a file of CIFAR, which has a dictionary. {_FIX}")
    return content


def _to_array(placeholder: Any) -> np.ndarray | None:
    """Return the array uint8 [N, 3072] of a placeholder, or None if it stands for anything else."""
    match placeholder:
        case _Placeholder(
            state=(
                _,
                (int(count), 3072),
                _Placeholder(arguments=("u1", *_)),
                by_column,
                str() | bytes() as data,
            )
        ):
            content = data.encode("latin1") if isinstance(data, str) else data
            if len(content) == count * 3072:
                return np.frombuffer(content, np.uint8).reshape(
                    (count, 3072), order="F" if by_column else "C"
                )
    return None


def _is_list_of(value: Any, item_type: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, item_type) for item in value)
