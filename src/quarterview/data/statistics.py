"""The channel means and deviations of a set."""

from collections.abc import Callable

import torch

from quarterview.data.reading import Report, read_many
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import to_float
from quarterview.errors import RunError

STATISTICS_IMAGES = 1024
_ROUNDING = 1e-6


def channel_statistics(
    source: Source, stream: SampleStream, threads: int, report: Callable[[Report], None]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1].

    Over the pixels of up to 1,024 keyed training images, each image counting alike whatever its
    size. A constant channel is given a deviation of 1, which normalises it to 0. Broken images are
    reported and left out.

    Raises:
        RunError: if none of them can be read.
    """
    means, squares = [], []
    ids = stream.training_sample(STATISTICS_IMAGES).tolist()
    for _, picture, reports in read_many(source, ids, threads):
        for said in reports:
            report(said)
        if picture is not None:
            pixels = to_float(picture.pixels).double().flatten(1)  # [C, H*W]
            means.append(pixels.mean(1))
            squares.append(pixels.square().mean(1))
    if not means:
        raise RunError(f"none of {len(ids)} images could be read; see bad_samples.jsonl for the reasons")
    mean = torch.stack(means).mean(0)
    std = (torch.stack(squares).mean(0) - mean.square()).clamp(min=0).sqrt()
    constant = std <= _ROUNDING * mean.abs()
    return tuple(mean.tolist()), tuple(std.masked_fill(constant, 1.0).tolist())
