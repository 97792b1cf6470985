"""Means and standard deviations of the channels of a dataset."""

from collections.abc import Callable

import torch

from quarterview.data.reading import SampleReport, read_samples
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import to_float
from quarterview.errors import RunError

MAX_STATISTICS_IMAGES = 1024
_CONSTANT_TOLERANCE = 1e-6  # relative rounding error of the standard deviation of a constant channel


def compute_channel_statistics(
    source: Source, stream: SampleStream, num_threads: int, on_report: Callable[[SampleReport], None]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and the standard deviation of each channel, of pixels in [0, 1].

    The statistics are over up to 1,024 random training images. All images have the same weight, whatever
    their size. Broken images are reported and left out. The standard deviation of a constant channel is set
    to 1, so that the channel is normalised to 0.

    Raises:
        RunError: if no image can be read.
    """
    means, squares = [], []
    ids = stream.select_train_ids(MAX_STATISTICS_IMAGES).tolist()
    for _, image, reports in read_samples(source, ids, num_threads):
        for report in reports:
            on_report(report)
        if image is not None:
            pixels = to_float(image.pixels).double().flatten(1)  # [C, H*W]
            means.append(pixels.mean(1))
            squares.append(pixels.square().mean(1))
    if not means:
        raise RunError(f"None of {len(ids)} images can be read. See bad_samples.jsonl for the reasons.")
    mean = torch.stack(means).mean(0)
    std = (torch.stack(squares).mean(0) - mean.square()).clamp(min=0).sqrt()
    constant = std <= _CONSTANT_TOLERANCE * mean.abs()
    return tuple(mean.tolist()), tuple(std.masked_fill(constant, 1.0).tolist())
