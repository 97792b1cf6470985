"""A source that reads images from NumPy arrays, ``.npy`` or ``.npz``, with any number of channels."""

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from quarterview.data.sources.base import BadSampleError, DecodedImage, compute_digest
from quarterview.data.sources.files import check_unchanged, get_signature
from quarterview.errors import UserError, unreadable

_IMAGE_KEYS = ("images", "x", "x_train", "train_images", "data", "arr_0")
_LABEL_KEYS = ("labels", "label", "y", "y_train", "train_labels")


class ArraySource:
    """The images of one array: [N, H, W], [N, H, W, C] or [N, C, H, W].

    The channel axis is the one of length `channels`, the last one if both are. A single channel is repeated.
    uint8 and bool become uint8 images, uint16 is divided by 65535, and floating point is unchanged.

    A ``.npy`` file is memory-mapped. In a ``.npz`` file the images are the array ``images``, ``x``,
    ``x_train``, ``train_images``, ``data`` or ``arr_0``, or the only array of three or four axes. The labels
    are the integers [N] or [N, 1] in ``labels``, ``label``, ``y``, ``y_train`` or ``train_labels``; an array
    of another type or shape there is ignored. Nothing is unpickled.

    Args:
        path: the file.
        channels: number of channels of the images that are returned.

    Raises:
        UserError: if the file has no such array, or its shape or type is not supported.
    """

    classes: Sequence[str] | None = None

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path = Path(path)
        self.channels = channels
        self._signature = get_signature(self.path)
        self._open()

    def __len__(self) -> int:
        return len(self._images)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "channels": self.channels, "_signature": self._signature}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        check_unchanged(self.path, self._signature)
        self._open()

    def image(self, index: int) -> DecodedImage:
        if isinstance(self._images, np.memmap):
            # Reading beyond the end of a mapped file that has shrunk would kill the process.
            check_unchanged(self.path, self._signature)
        values = self._images[index]  # [H, W], [H, W, C] or [C, H, W]
        if values.ndim == 2:
            values = values[None]
        elif self._channels_last:
            values = values.transpose(2, 0, 1)
        pixels = torch.from_numpy(_to_pixels(values))  # [1 or C, H, W]
        if pixels.is_floating_point() and not pixels.isfinite().all():
            raise BadSampleError("the image holds values that are not finite")
        return DecodedImage(pixels.expand(self.channels, -1, -1).contiguous())

    def label(self, index: int) -> int | None:
        label = -1 if self._labels is None else int(self._labels[index])
        return label if label >= 0 else None

    def name(self, index: int) -> str:
        return f"{self.path} image {index}"

    def fingerprint(self) -> str:
        """Return a hash of the array's shape and type, the labels, and 64 images at equal distances."""
        rows = np.unique(np.linspace(0, len(self) - 1, 64).astype(int))
        sample = hashlib.blake2b(self._images[rows].tobytes())
        if self._labels is not None:
            sample.update(self._labels.tobytes())
        return compute_digest(self._images.shape, self._images.dtype, sample.hexdigest())

    def _open(self) -> None:
        try:
            with self.path.open("rb") as file:
                if file.read(2) == b"PK":  # a .npz file: NumPy would leave it open if it is damaged
                    file.seek(0)
                    _check_memory(file, self.path)
                    with np.load(file, allow_pickle=False) as arrays:
                        self._images = arrays[_choose_image_key(arrays, self.path)]
                        self._labels = _read_labels(arrays, len(self._images))
                else:
                    self._images, self._labels = np.load(self.path, mmap_mode="r", allow_pickle=False), None
        except UserError:
            raise
        except Exception as error:  # NumPy, zipfile and zlib raise errors of many types for a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise unreadable(
                self.path, reason, "Give a .npy or .npz file of numbers, without pickles."
            ) from error
        _check_type(self._images.dtype, self.path)
        self._channels_last = _is_channels_last(self._images.shape, self.channels, self.path)


def _check_memory(file: BinaryIO, path: Path) -> None:
    """Raise UserError if an array of a .npz file, which is decompressed as a whole, would fill the memory."""
    with zipfile.ZipFile(file) as archive:
        largest = max((member.file_size for member in archive.infolist()), default=0)
    file.seek(0)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if largest > memory // 2:
        raise UserError(
            f"{path} has an array of {largest:,} bytes, more than half of this machine's memory, {memory:,}. "
            "Give a .npy file, which is memory-mapped."
        )


def _choose_image_key(arrays: Mapping[str, np.ndarray], path: Path) -> str:
    named = [key for key in _IMAGE_KEYS if key in arrays]
    if named:
        return named[0]
    shapes = {key: arrays[key].shape for key in arrays}
    candidates = [key for key, shape in shapes.items() if len(shape) in (3, 4)]
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items()) or "nothing"
    raise UserError(
        f"{path} has no array that is known to be the images: {listed}. Name it one of "
        f"{', '.join(_IMAGE_KEYS)}, or give a single array of three or four axes."
    )


def _read_labels(arrays: Mapping[str, np.ndarray], num_images: int) -> np.ndarray | None:
    for key in _LABEL_KEYS:
        if key in arrays:
            labels = arrays[key]
            if labels.shape in ((num_images,), (num_images, 1)) and np.issubdtype(labels.dtype, np.integer):
                return labels.reshape(num_images)
    return None


def _check_type(dtype: np.dtype, path: Path) -> None:
    if dtype.kind not in "bf" and not (dtype.kind == "u" and dtype.itemsize <= 2):
        raise UserError(
            f"{path} has the type {dtype}, whose value range is unknown. Give uint8, uint16, bool or floats."
        )


def _is_channels_last(shape: tuple[int, ...], channels: int, path: Path) -> bool:
    """Return True if the last of four axes is the channels, False if the second is, or there is none."""
    if 0 not in shape:
        if len(shape) == 3:
            return False
        if len(shape) == 4:
            for length in (channels, 1):
                if shape[3] == length:
                    return True
                if shape[1] == length:
                    return False
    raise UserError(
        f"{path} has the shape {list(shape)}, which is not {channels} channels. Give [N, H, W], "
        f"[N, H, W, C] or [N, C, H, W], where C is {channels} or 1, or another --in-chans."
    )


def _to_pixels(values: np.ndarray) -> np.ndarray:
    """Return a copy of an array as uint8 or float32."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return values.copy()
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is refused
        pixels = values.astype(np.float32)
    return pixels / 65535 if values.dtype.kind == "u" else pixels
