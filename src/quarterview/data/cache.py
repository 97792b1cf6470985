"""A dataset that is decoded once and kept on the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from quarterview.data.reading import SampleReport, iterate_candidates, read_samples
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source

MAX_CACHE_BYTES = 2 << 30
"""Datasets of up to this many bytes are kept on the device with ``--cache auto``."""


class CachedDataset:
    """The images of a dataset on the device.

    Args:
        images: uint8 [N, C, H, W], indexed by sample id. The rows of broken samples are zero.
        broken_ids: ids of the samples that cannot be decoded.
    """

    def __init__(self, images: Tensor, broken_ids: set[int]) -> None:
        self.images, self.broken_ids = images, broken_ids

    def replace_broken(self, stream: SampleStream, epochs: Tensor, ids: Tensor) -> Tensor:
        """Return `ids`, int64 [B], with the id of each broken sample replaced by that of its replacement."""
        if not self.broken_ids:
            return ids
        pairs = zip(ids.tolist(), epochs.tolist(), strict=True)
        return torch.tensor(
            [
                next(c for c in iterate_candidates(stream, sample, epoch) if c not in self.broken_ids)
                for sample, epoch in pairs
            ]
        )


def load_cached_dataset(
    source: Source,
    device: torch.device,
    max_bytes: int,
    num_threads: int,
    on_report: Callable[[SampleReport], None],
) -> CachedDataset | str:
    """Decode a whole dataset onto the device, or return a short reason why it cannot be cached.

    All images must be uint8 and of one size, and their pixels must fit into `max_bytes`. The result depends
    on nothing else.

    Args:
        num_threads: how many images are decoded at the same time.
        on_report: called for each image that is broken or was converted.
    """
    images: Tensor | None = None
    broken_ids: set[int] = set()
    for sample, image, reports in read_samples(source, range(len(source)), num_threads):
        for report in reports:
            on_report(report)
        if image is None:
            broken_ids.add(sample)
            continue
        if image.pixels.dtype != torch.uint8:
            return "images of more than 8 bits"
        if len(source) * image.pixels.numel() > max_bytes:
            return f"more than {max_bytes >> 20} MiB of pixels"
        if images is None:
            images = torch.zeros(len(source), *image.pixels.shape, dtype=torch.uint8)
        if image.pixels.shape != images.shape[1:]:
            return "images of several sizes"
        images[sample] = image.pixels
    return "no readable image" if images is None else CachedDataset(images.to(device), broken_ids)
