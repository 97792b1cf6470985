"""What a set of images is like: whether there is anything in it to learn from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quarterview.data.loader import central, stack
from quarterview.data.reading import read_many
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import to_float

_THREADS = 4
_LEVEL = 1 / 255


class Sample(NamedTuple):
    """Some images of a set, and what they are like."""

    ids: Tensor
    """int64 [N], those that could be read."""
    images: Tensor
    """float32 [N, C, H, W] in [0, 1], the largest central boxes, resized."""
    neighbours: Tensor
    """float [N], see `neighbour_correlation`, of the images as they are stored; nan where constant."""
    eight_bit: bool
    """Whether all of them are uint8."""


class Pictures(NamedTuple):
    """What the images of a sample have and lack."""

    count: int
    neighbours: float | None
    """Mean correlation of neighbouring pixels within an image; None if all are constant."""
    deviation: float
    """Standard deviation of a pixel, of [0, 1], over images and places."""
    difference: float
    """The same over images alone, at one place: 0 if all images are equal."""
    constant: float
    """Share of images of a single colour, give or take half a grey level."""
    repeated: float
    """Share of images that equal an earlier one bit for bit."""
    flat: float
    """Share of patches that vary by less than a grey level (of 255)."""

    @property
    def between(self) -> float:
        """Share of the variance that is between images rather than common to all of them."""
        return (self.difference / self.deviation) ** 2 if self.deviation else 0.0


def read_sample(source: Source, ids: Sequence[int], image_size: Sequence[int]) -> Sample:
    """Read the images `ids`, leaving out those that cannot be read."""
    kept: list[int] = []
    pixels: list[Tensor] = []
    neighbours: list[float] = []
    for sample, picture, _ in read_many(source, ids, _THREADS):
        if picture is not None:
            kept.append(sample)
            pixels.append(central(picture.pixels, image_size))
            neighbours.append(neighbour_correlation(to_float(picture.pixels)))
    images = to_float(stack(pixels)) if pixels else torch.empty(0, 1, *image_size)
    eight_bit = all(p.dtype == torch.uint8 for p in pixels)
    return Sample(torch.tensor(kept, dtype=torch.int64), images, torch.tensor(neighbours), eight_bit)


def neighbour_correlation(image: Tensor) -> float:
    """How alike neighbouring pixels are, each channel about its own mean within the image.

    1 for a smooth picture, 0 for pixels in random order; nan for a constant one.

    Args:
        image: float [C, H, W].
    """
    x = image.double() - image.double().mean(dim=(1, 2), keepdim=True)
    products, squares = 0.0, 0.0
    for first, second in ((x[:, 1:], x[:, :-1]), (x[:, :, 1:], x[:, :, :-1])):
        products += float((first * second).sum())
        squares += float((first.square() + second.square()).sum()) / 2
    return products / squares if squares > 1e-12 * x.numel() else float("nan")


def describe(sample: Sample, patch_size: int) -> Pictures:
    """Measure a sample of one image or more."""
    x = sample.images.double()
    channels = x.transpose(0, 1).flatten(1)  # [C, N*H*W]
    known = sample.neighbours[~sample.neighbours.isnan()]
    own = x.flatten(1)
    patches = x.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size)).permute(0, 2, 4, 1, 3, 5)
    return Pictures(
        len(x),
        float(known.mean()) if len(known) else None,
        float(channels.var(dim=1, correction=0).mean().sqrt()),
        float(x.var(dim=0, correction=0).mean().sqrt()),
        float((_ranges(x) < _LEVEL / 2).double().mean()),
        1 - len(torch.unique(own, dim=0)) / len(own),
        float((patches.flatten(3).std(dim=3) < _LEVEL).double().mean()),
    )


def _ranges(x: Tensor) -> Tensor:
    """The largest range of any channel, for each image: [N]."""
    return (x.amax(dim=(2, 3)) - x.amin(dim=(2, 3))).amax(dim=1)
