"""A part of a labelled set."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quarterview.data.reading import BulkSource
from quarterview.data.sources.base import Croppable, Picture, Source, croppable, digest


class Subset:
    """The images `ids` of a source, numbered from 0, in that order."""

    def __init__(self, source: Source, ids: Sequence[int]) -> None:
        self.source, self.ids, self.classes = source, list(ids), source.classes

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Picture:
        return self.source.image(self.ids[index])

    def croppable(self, index: int) -> Croppable:
        return croppable(self.source, self.ids[index])

    def label(self, index: int) -> int | None:
        return self.source.label(self.ids[index])

    def name(self, index: int) -> str:
        return self.source.name(self.ids[index])

    def fingerprint(self) -> str:
        return digest(self.source.fingerprint(), *self.ids)


class BulkSubset(Subset):
    """Likewise, of a source that makes many images at once."""

    def images(self, ids: Tensor) -> Tensor:
        assert isinstance(self.source, BulkSource)
        return self.source.images(torch.tensor(self.ids)[ids])


def subset(source: Source, ids: Sequence[int]) -> Source:
    """The images `ids` of a source as a source of their own; the source itself if those are all."""
    if list(ids) == list(range(len(source))):
        return source
    return BulkSubset(source, ids) if isinstance(source, BulkSource) else Subset(source, ids)
