"""What every set of images looks like to the rest of the program."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from quarterview.data.transforms.crop import crop_resize
from quarterview.errors import UserError


class BadSampleError(Exception):
    """One image cannot be used: broken, hostile or empty. The loader replaces and records it."""


class Picture(NamedTuple):
    """One decoded image.

    `pixels` is uint8 [C, H, W], or float32 [C, H, W] where the file holds more than eight bits:
    16-bit integers divided by 65535, floating-point arrays as they are. `notes` says in a few
    words each thing that was done to it beyond decoding, such as "CMYK converted to RGB".
    """

    pixels: Tensor
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """A sequence of images, some of which may be labelled or broken.

    Sources travel to worker processes by pickling, so they open files late and keep no handles.
    """

    classes: Sequence[str] | None
    """The names of the labels 0, 1, …; None where there are no labels, or they have no names."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Picture:
        """Decode image `index`. Raises BadSampleError if that image is unusable, and UserError if the
        set as a whole does not fit the request (a number of channels that cannot be met)."""
        ...

    def label(self, index: int) -> int | None: ...

    def name(self, index: int) -> str:
        """What a person would call it: a path, or the set and the row."""
        ...

    def fingerprint(self) -> str:
        """Sixteen hex digits that change when the set changes; cheap even for large sets."""
        ...


class Croppable(Protocol):
    """One image, of which a part may be had for less than the whole."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the whole picture."""
        ...

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> Picture:
        """The part in `box` (top, left, height, width), resized to [C, *image_size].

        It may be made of a smaller copy of the image, if the box has at least `image_size` pixels in
        it; so its pixels may differ a little from those of the whole picture. Raises BadSampleError if
        the image turns out to be unusable.
        """
        ...


class CropSource(Protocol):
    """A source that may offer this where crops are cheaper than whole pictures; nothing else differs."""

    def croppable(self, index: int) -> Croppable:
        """Open image `index`. Raises what `image` does, here or when it is cropped."""
        ...


class ShardedSource(Protocol):
    """A source may offer this where it lies in parts of which each is best read as a whole."""

    def shard_starts(self) -> np.ndarray:
        """int64 [shards + 1]: the first image of each part, and the number of all."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether it is read over a network."""
        ...


class Whole(NamedTuple):
    """A picture that is there already, to be cropped."""

    picture: Picture

    @property
    def size(self) -> tuple[int, int]:
        _, height, width = self.picture.pixels.shape
        return height, width

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> Picture:
        return self.picture._replace(pixels=crop_resize(self.picture.pixels, box, image_size))


def croppable(source: Source, index: int) -> Croppable:
    """Image `index` to be cropped, in the cheapest way that its source knows."""
    own = getattr(source, "croppable", None)  # isinstance would take longer than some crops' decoding
    return Whole(source.image(index)) if own is None else own(index)


def shard_starts(source: Source) -> np.ndarray | None:
    """Where the parts of a source begin, see `ShardedSource`; None if it has none."""
    own = getattr(source, "shard_starts", None)
    return None if own is None else own()


def is_remote(source: Source) -> bool:
    """Whether a source, or a part of it, is read over a network."""
    return bool(getattr(source, "is_remote", False))


def remarks(source: Source) -> list[str]:
    """What a source says of itself as a whole: a sentence for each thing that is odd about it."""
    own = getattr(source, "remarks", None)
    return [] if own is None else own()


class Concatenated:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.classes = self.parts[0].classes
        if any(part.classes != self.classes for part in self.parts):
            self.classes = None  # labels of different sets do not mean the same thing
        self._mixed = self.classes is None and len(self.parts) > 1
        self._starts = [0]
        for part in self.parts:
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        for part, start in zip(reversed(self.parts), reversed(self._starts[:-1]), strict=True):
            if index >= start:
                return part, index - start
        raise AssertionError("unreachable: starts[0] is 0")

    def image(self, index: int) -> Picture:
        part, inner = self._find(index)
        return part.image(inner)

    def croppable(self, index: int) -> Croppable:
        part, inner = self._find(index)
        return croppable(part, inner)

    def label(self, index: int) -> int | None:
        if self._mixed:
            return None
        part, inner = self._find(index)
        return part.label(inner)

    def name(self, index: int) -> str:
        part, inner = self._find(index)
        return part.name(inner)

    def shard_starts(self) -> np.ndarray | None:
        """As of a `ShardedSource`, a source without parts being one; None if no source has any."""
        found = [shard_starts(part) for part in self.parts]
        if all(starts is None for starts in found):
            return None
        own = [
            np.array([0, len(part)]) if starts is None else starts
            for part, starts in zip(self.parts, found, strict=True)
        ]
        begins = [starts[:-1] + first for starts, first in zip(own, self._starts[:-1], strict=True)]
        return np.concatenate([*begins, [len(self)]])

    @property
    def is_remote(self) -> bool:
        return any(is_remote(part) for part in self.parts)

    def remarks(self) -> list[str]:
        return [line for part in self.parts for line in remarks(part)]

    def fingerprint(self) -> str:
        return digest(*(part.fingerprint() for part in self.parts))


def digest(*parts: object) -> str:
    """Sixteen hex digits of the parts' text, for fingerprints."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def labels_of(source: Source) -> list[int]:
    """Every label of a labelled set. Raises UserError if an image has none."""
    labels = [source.label(index) for index in range(len(source))]
    if any(label is None for label in labels):
        raise UserError(
            "this needs labelled images, and these have no labels; accepted: a folder with one "
            "sub-folder a class, parquet with a label column, .npz with `labels`, or torchvision sets"
        )
    return [label for label in labels if label is not None]
