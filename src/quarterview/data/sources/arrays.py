"""Images that lie in NumPy arrays: ``.npy``, ``.npz``, any number of channels."""

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from quarterview.data.sources.base import BadSampleError, Picture, digest
from quarterview.data.sources.files import check_unchanged, stamped
from quarterview.errors import UserError

_IMAGE_KEYS = ("images", "x", "x_train", "train_images", "data", "arr_0")
_LABEL_KEYS = ("labels", "label", "y", "y_train", "train_labels")


class ArraySource:
    """The images of one array: [N, H, W], [N, H, W, C] or [N, C, H, W].

    The axis as long as `channels` is the channels, the last if both are; a single channel, or none, is
    grey and repeated. uint8 and bool become uint8 pictures, uint16 is divided by 65535, and floating
    point is taken as it is. A ``.npy`` file is mapped, never read whole; a ``.npz`` file is read from its
    key ``images``, ``x``, ``x_train``, ``train_images``, ``data``, ``arr_0``, or its only array of three
    or four axes. Its labels are the integers [N] or [N, 1] at ``labels``, ``label``, ``y``, ``y_train``
    or ``train_labels``; anything else there is no class and leaves the set unlabelled. Nothing is ever
    unpickled.

    Args:
        path: the file.
        channels: how many channels the pictures shall have.

    Raises:
        UserError: if the file holds no such array, or one whose shape or type does not fit.
    """

    classes: Sequence[str] | None = None

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path = Path(path)
        self.channels = channels
        self._stamp = stamped(self.path)
        self._open()

    def __len__(self) -> int:
        return len(self._images)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "channels": self.channels, "_stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        check_unchanged(self.path, self._stamp)
        self._open()

    def image(self, index: int) -> Picture:
        if isinstance(self._images, np.memmap):  # to read behind a new end would end the process
            check_unchanged(self.path, self._stamp)
        values = self._images[index]  # [H, W], or three axes
        if values.ndim == 2:
            values = values[None]
        elif self._channels_last:
            values = values.transpose(2, 0, 1)
        pixels = torch.from_numpy(_pixels(values))  # [1 or C, H, W]
        if pixels.is_floating_point() and not pixels.isfinite().all():
            raise BadSampleError("the image holds values that are not finite")
        return Picture(pixels.expand(self.channels, -1, -1).contiguous())

    def label(self, index: int) -> int | None:
        label = -1 if self._labels is None else int(self._labels[index])
        return label if label >= 0 else None

    def name(self, index: int) -> str:
        return f"{self.path} image {index}"

    def fingerprint(self) -> str:
        """Over the array's shape and type, the labels, and 64 images from all over the set."""
        rows = np.unique(np.linspace(0, len(self) - 1, 64).astype(int))
        sample = hashlib.blake2b(self._images[rows].tobytes())
        if self._labels is not None:
            sample.update(self._labels.tobytes())
        return digest(self._images.shape, self._images.dtype, sample.hexdigest())

    def _open(self) -> None:
        try:
            with self.path.open("rb") as file:
                if file.read(2) == b"PK":  # a .npz, which NumPy would leave open if it is damaged
                    file.seek(0)
                    _check_memory(file, self.path)
                    with np.load(file, allow_pickle=False) as found:
                        self._images = found[_image_key(found, self.path)]
                        self._labels = _labels_in(found, len(self._images))
                else:
                    self._images, self._labels = np.load(self.path, mmap_mode="r", allow_pickle=False), None
        except UserError:
            raise
        except Exception as error:  # NumPy, zipfile and zlib raise nearly everything of a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"cannot read {self.path}: {reason}; accepted: .npy and .npz of numbers, nothing pickled"
            ) from error
        _check_type(self._images.dtype, self.path)
        self._channels_last = _channels_come_last(self._images.shape, self.channels, self.path)


def _check_memory(file: BinaryIO, path: Path) -> None:
    """Raises UserError if an array of a .npz file, which is unpacked as a whole, would fill the memory."""
    with zipfile.ZipFile(file) as archive:
        largest = max((member.file_size for member in archive.infolist()), default=0)
    file.seek(0)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if largest > memory // 2:
        raise UserError(
            f"{path} holds an array of {largest:,} bytes once unpacked, and this machine has {memory:,}; "
            "accepted: half of that, or .npy, which is not read as a whole"
        )


def _image_key(arrays: Mapping[str, np.ndarray], path: Path) -> str:
    named = [key for key in _IMAGE_KEYS if key in arrays]
    if named:
        return named[0]
    shapes = {key: arrays[key].shape for key in arrays}
    candidates = [key for key, shape in shapes.items() if len(shape) in (3, 4)]
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items()) or "nothing"
    raise UserError(
        f"{path} does not say which array is the images; it holds {listed}; accepted: one of the names "
        f"{', '.join(_IMAGE_KEYS)}, or a single array of three or four axes"
    )


def _labels_in(arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray | None:
    for key in _LABEL_KEYS:
        if key in arrays:
            labels = arrays[key]
            if labels.shape in ((count,), (count, 1)) and np.issubdtype(labels.dtype, np.integer):
                return labels.reshape(count)
    return None


def _check_type(dtype: np.dtype, path: Path) -> None:
    if dtype.kind not in "bf" and not (dtype.kind == "u" and dtype.itemsize <= 2):
        raise UserError(
            f"{path} holds {dtype}, whose range nobody knows; accepted: uint8, uint16, bool, floating point"
        )


def _channels_come_last(shape: tuple[int, ...], channels: int, path: Path) -> bool:
    """Whether the last of four axes is the channels; False where the second is, or where there is none."""
    if 0 not in shape:
        if len(shape) == 3:
            return False
        if len(shape) == 4:
            for wanted in (channels, 1):
                if shape[3] == wanted:
                    return True
                if shape[1] == wanted:
                    return False
    raise UserError(
        f"{path} has the shape {list(shape)}, which does not give {channels} channels; accepted: [N, H, W], "
        f"[N, H, W, C] or [N, C, H, W], where C is {channels} or 1"
    )


def _pixels(values: np.ndarray) -> np.ndarray:
    """A copy of an array of an accepted type, as uint8 or float32."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return values.copy()
    with np.errstate(over="ignore"):  # too large for float32 is infinite, and said to be
        pixels = values.astype(np.float32)
    return pixels / 65535 if values.dtype.kind == "u" else pixels
