"""Statistics of a set of images that show whether a model can learn from it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quarterview.data.loader import resized_center_crop, stack_images
from quarterview.data.reading import read_samples
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import to_float

_NUM_THREADS = 4
_GRAY_LEVEL = 1 / 255  # one step of 8-bit values, in [0, 1]


class ImageSample(NamedTuple):
    """A sample of the images of a set."""

    ids: Tensor
    """int64 [N], the ids of the readable images."""
    images: Tensor
    """float32 [N, C, H, W] in [0, 1], the largest central boxes, resized."""
    neighbor_correlations: Tensor
    """float [N], see `compute_neighbor_correlation`, of the original images; nan for constant ones."""
    eight_bit: bool
    """True if all images are uint8."""


class ImageStatistics(NamedTuple):
    """Statistics of a sample of images. The field names are keys of result files."""

    count: int
    """Number of images."""
    neighbours: float | None
    """Mean correlation of neighbouring pixels within an image; None if all images are constant."""
    deviation: float
    """Standard deviation of the pixel values in [0, 1] over images and positions."""
    difference: float
    """Standard deviation of the pixel values over images at a fixed position; 0 if all images are equal."""
    constant: float
    """Fraction of images with a single colour, within half a gray level of 255."""
    repeated: float
    """Fraction of images that are bit-identical to an earlier image."""
    flat: float
    """Fraction of patches with a standard deviation below one gray level of 255."""

    @property
    def between_variance_ratio(self) -> float:
        """The ratio of the variance between images to the total variance of the pixel values."""
        return (self.difference / self.deviation) ** 2 if self.deviation else 0.0


def read_image_sample(source: Source, ids: Sequence[int], image_size: Sequence[int]) -> ImageSample:
    """Read the images `ids` as central crops of `image_size`. Unreadable images are left out."""
    read_ids: list[int] = []
    pixels: list[Tensor] = []
    correlations: list[float] = []
    for sample, image, _ in read_samples(source, ids, _NUM_THREADS):
        if image is not None:
            read_ids.append(sample)
            pixels.append(resized_center_crop(image.pixels, image_size))
            correlations.append(compute_neighbor_correlation(to_float(image.pixels)))
    images = to_float(stack_images(pixels)) if pixels else torch.empty(0, 1, *image_size)
    eight_bit = all(p.dtype == torch.uint8 for p in pixels)
    return ImageSample(
        torch.tensor(read_ids, dtype=torch.int64), images, torch.tensor(correlations), eight_bit
    )


def compute_neighbor_correlation(image: Tensor) -> float:
    """Compute the correlation of neighbouring pixels, after subtracting the mean of each channel.

    It is near 1 for a smooth image, near 0 for pixels in random order, and nan for a constant image.

    Args:
        image: float [C, H, W].
    """
    x = image.double() - image.double().mean(dim=(1, 2), keepdim=True)
    products, squares = 0.0, 0.0
    for first, second in ((x[:, 1:], x[:, :-1]), (x[:, :, 1:], x[:, :, :-1])):
        products += float((first * second).sum())
        squares += float((first.square() + second.square()).sum()) / 2
    return products / squares if squares > 1e-12 * x.numel() else float("nan")


def compute_image_statistics(sample: ImageSample, patch_size: int) -> ImageStatistics:
    """Compute the statistics of a sample of at least one image."""
    x = sample.images.double()
    channels = x.transpose(0, 1).flatten(1)  # [C, N*H*W]
    known = sample.neighbor_correlations[~sample.neighbor_correlations.isnan()]
    flat = x.flatten(1)
    patches = x.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size)).permute(0, 2, 4, 1, 3, 5)
    return ImageStatistics(
        len(x),
        float(known.mean()) if len(known) else None,
        float(channels.var(dim=1, correction=0).mean().sqrt()),
        float(x.var(dim=0, correction=0).mean().sqrt()),
        float((_compute_ranges(x) < _GRAY_LEVEL / 2).double().mean()),
        1 - len(torch.unique(flat, dim=0)) / len(flat),
        float((patches.flatten(3).std(dim=3) < _GRAY_LEVEL).double().mean()),
    )


def _compute_ranges(x: Tensor) -> Tensor:
    """Compute the range of pixel values of each image, the largest over its channels: [N]."""
    return (x.amax(dim=(2, 3)) - x.amin(dim=(2, 3))).amax(dim=1)
