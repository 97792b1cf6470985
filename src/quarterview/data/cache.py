"""A whole set, decoded once and held on the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from quarterview.data.reading import Report, candidates, read_many
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source

CACHE_BYTES = 2 << 30
"""Sets up to this size are held on the device by ``--cache auto``."""


class CachedSet:
    """`images` is uint8 [N, C, H, W] on the device; the rows of `broken` samples hold nothing."""

    def __init__(self, images: Tensor, broken: set[int]) -> None:
        self.images, self.broken = images, broken

    def rows(self, stream: SampleStream, epochs: Tensor, ids: Tensor) -> Tensor:
        """The rows to read for `ids`: their own, or that of a replacement. int64 [B]."""
        if not self.broken:
            return ids
        pairs = zip(ids.tolist(), epochs.tolist(), strict=True)
        return torch.tensor(
            [
                next(c for c in candidates(stream, sample, epoch) if c not in self.broken)
                for sample, epoch in pairs
            ]
        )


def load_all(
    source: Source, device: torch.device, limit: int, threads: int, report: Callable[[Report], None]
) -> CachedSet | str:
    """Decode a whole set onto the device, or say in a few words why it cannot be held.

    The answer depends on the images alone: they must all have eight bits and one size, and `limit`
    bytes must hold them.
    """
    images: Tensor | None = None
    broken: set[int] = set()
    for sample, picture, reports in read_many(source, range(len(source)), threads):
        for said in reports:
            report(said)
        if picture is None:
            broken.add(sample)
            continue
        if picture.pixels.dtype != torch.uint8:
            return "images of more than 8 bits"
        if len(source) * picture.pixels.numel() > limit:
            return f"more than {limit >> 20} MiB of pixels"
        if images is None:
            images = torch.zeros(len(source), *picture.pixels.shape, dtype=torch.uint8)
        if picture.pixels.shape != images.shape[1:]:
            return "images of several sizes"
        images[sample] = picture.pixels
    return "no readable image" if images is None else CachedSet(images.to(device), broken)
