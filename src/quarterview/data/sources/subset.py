"""A source that contains a selection of the images of another source."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quarterview.data.reading import BulkSource
from quarterview.data.sources.base import Croppable, DecodedImage, Source, compute_digest, open_croppable


class Subset:
    """The images `ids` of a source, in that order, with indices from 0."""

    def __init__(self, source: Source, ids: Sequence[int]) -> None:
        self.source, self.ids, self.classes = source, list(ids), source.classes

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> DecodedImage:
        return self.source.image(self.ids[index])

    def croppable(self, index: int) -> Croppable:
        return open_croppable(self.source, self.ids[index])

    def label(self, index: int) -> int | None:
        return self.source.label(self.ids[index])

    def name(self, index: int) -> str:
        return self.source.name(self.ids[index])

    def fingerprint(self) -> str:
        return compute_digest(self.source.fingerprint(), *self.ids)


class BulkSubset(Subset):
    """A `Subset` of a source that produces many images at once, see `BulkSource`."""

    def images(self, ids: Tensor) -> Tensor:
        assert isinstance(self.source, BulkSource)
        return self.source.images(torch.tensor(self.ids)[ids])


def select_subset(source: Source, ids: Sequence[int]) -> Source:
    """Return a source of the images `ids` of a source, or the source itself if they are all of its images."""
    if list(ids) == list(range(len(source))):
        return source
    return BulkSubset(source, ids) if isinstance(source, BulkSource) else Subset(source, ids)
