"""The interface of data sources, `Source`, and the tools that work on any of them."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from quarterview.data.transforms.crop import crop_resize
from quarterview.errors import UserError


class BadSampleError(Exception):
    """An image cannot be used: it is broken, hostile or empty. The loader replaces and records it."""


class DecodedImage(NamedTuple):
    """A decoded image.

    Attributes:
        pixels: uint8 [C, H, W]; or float32 [C, H, W] if the file holds more than eight bits: 16-bit integers
            divided by 65535, floating-point arrays unchanged.
        notes: a short remark on each conversion beyond decoding, such as "CMYK converted to RGB".
    """

    pixels: Tensor
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """A sequence of images, with or without labels. Some images may be broken.

    Sources are pickled when they are sent to worker processes, so they open files late and keep no handles.
    """

    classes: Sequence[str] | None
    """The names of the labels 0, 1, …; None if there are no labels, or they have no names."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> DecodedImage:
        """Decode image `index`.

        Raises:
            BadSampleError: if this image cannot be used.
            UserError: if no image of the source can be used as requested, for instance with so many channels.
        """
        ...

    def label(self, index: int) -> int | None: ...

    def name(self, index: int) -> str:
        """Return the name of image `index` for people: its path, or the data set and the row."""
        ...

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when the data changes. Cheap even for large data sets."""
        ...


class Croppable(Protocol):
    """An image of which a crop can be decoded faster than the whole image."""

    @property
    def size(self) -> tuple[int, int]:
        """The height and width of the whole image, in pixels."""
        ...

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> DecodedImage:
        """Return the crop `box` (top, left, height, width), resized to [C, *image_size].

        It may be decoded at a reduced scale, if the box then still has at least `image_size` pixels. So its
        pixels may differ slightly from a crop of the whole image.

        Raises:
            BadSampleError: if the image cannot be used.
        """
        ...


class CropSource(Protocol):
    """An optional method of a source whose crops can be decoded faster than whole images."""

    def croppable(self, index: int) -> Croppable:
        """Open image `index`. Raises the errors of `Source.image`, now or when the image is cropped."""
        ...


class ShardedSource(Protocol):
    """Optional methods of a source that is stored in shards, each of which is best read sequentially."""

    def shard_starts(self) -> np.ndarray:
        """Return int64 [num_shards + 1]: the first image of each shard, and the number of images."""
        ...

    @property
    def is_remote(self) -> bool:
        """True if the source is read over a network."""
        ...


class WholeImage(NamedTuple):
    """A `Croppable` made from an image that is already decoded."""

    image: DecodedImage

    @property
    def size(self) -> tuple[int, int]:
        _, height, width = self.image.pixels.shape
        return height, width

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> DecodedImage:
        return self.image._replace(pixels=crop_resize(self.image.pixels, box, image_size))


def open_croppable(source: Source, index: int) -> Croppable:
    """Open image `index` for cropping, in the fastest way that its source offers."""
    croppable = getattr(source, "croppable", None)  # isinstance would take longer than decoding some crops
    return WholeImage(source.image(index)) if croppable is None else croppable(index)


def get_shard_starts(source: Source) -> np.ndarray | None:
    """Return where the shards of a source begin, see `ShardedSource`; None if it has no shards."""
    shard_starts = getattr(source, "shard_starts", None)
    return None if shard_starts is None else shard_starts()


def is_remote(source: Source) -> bool:
    """Return True if a source, or a part of it, is read over a network."""
    return bool(getattr(source, "is_remote", False))


def get_remarks(source: Source) -> list[str]:
    """Return a sentence on each unusual property of a source as a whole, such as skipped files."""
    remarks = getattr(source, "remarks", None)
    return [] if remarks is None else remarks()


class ConcatenatedSource:
    """The images of several sources, one source after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.sources = list(parts)
        self.classes = self.sources[0].classes
        if any(part.classes != self.classes for part in self.sources):
            self.classes = None  # the labels of different data sets do not mean the same
        self._mixed = self.classes is None and len(self.sources) > 1
        self._starts = [0]
        for part in self.sources:
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        for part, start in zip(reversed(self.sources), reversed(self._starts[:-1]), strict=True):
            if index >= start:
                return part, index - start
        raise AssertionError("unreachable: starts[0] is 0")

    def image(self, index: int) -> DecodedImage:
        part, inner = self._find(index)
        return part.image(inner)

    def croppable(self, index: int) -> Croppable:
        part, inner = self._find(index)
        return open_croppable(part, inner)

    def label(self, index: int) -> int | None:
        if self._mixed:
            return None
        part, inner = self._find(index)
        return part.label(inner)

    def name(self, index: int) -> str:
        part, inner = self._find(index)
        return part.name(inner)

    def shard_starts(self) -> np.ndarray | None:
        """Return where shards begin; a source without shards is one. None if no source has shards."""
        per_source = [get_shard_starts(part) for part in self.sources]
        if all(starts is None for starts in per_source):
            return None
        shifted = [
            (np.array([0, len(part)]) if starts is None else starts)[:-1] + first
            for part, starts, first in zip(self.sources, per_source, self._starts[:-1], strict=True)
        ]
        return np.concatenate([*shifted, [len(self)]])

    @property
    def is_remote(self) -> bool:
        return any(is_remote(part) for part in self.sources)

    def remarks(self) -> list[str]:
        return [line for part in self.sources for line in get_remarks(part)]

    def fingerprint(self) -> str:
        return compute_digest(*(part.fingerprint() for part in self.sources))


def compute_digest(*parts: object) -> str:
    """Return a hash of the text of the parts, 16 hex digits, for fingerprints."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def read_all_labels(source: Source) -> list[int]:
    """Return the label of every image. Raises UserError if an image has none."""
    labels = [source.label(index) for index in range(len(source))]
    if any(label is None for label in labels):
        raise UserError(
            "These images have no labels, which are needed. Give a folder with one sub-folder per class, "
            "Parquet with a label column, .npz with `labels`, or a torchvision data set."
        )
    return [label for label in labels if label is not None]
