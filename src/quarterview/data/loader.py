"""Batches of the sample stream: from workers that decode, or from a copy on the device.

What a batch contains depends on its positions in the stream alone, never on how it was fetched.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from signal import SIG_IGN, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, signal
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from quarterview.data.cache import CachedSet
from quarterview.data.config import AugmentConfig, View
from quarterview.data.reading import Report, attempt, attempt_picture, opened, read_many
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Croppable, Source
from quarterview.data.transforms.crop import crop_resize, crop_resize_batch, eval_box, normalise, to_float
from quarterview.data.transforms.randaugment import erase, randaugment
from quarterview.data.transforms.views import boxes_of, distort
from quarterview.data.workers import watched
from quarterview.errors import RunError, UserError

_OPEN = 32
"""Images that a worker holds open at a time: as encoded files, or as whole pictures."""


class Batch(NamedTuple):
    """What an objective is given."""

    images: Tensor
    """float32 [B, C, H, W], normalised, on the device."""
    ids: Tensor
    """int64 [B], on the device: the samples."""
    epochs: Tensor
    """int64 [B], on the device: the epoch each sample is seen in."""
    labels: Tensor | None = None
    """int64 [B], on the device: the class of each picture, from a loader that was given labels."""
    second: Tensor | None = None
    """float32 [B, C, H, W], another view of each image, from a loader that makes two."""

    def split(self, size: int) -> Iterator["Batch"]:
        """Cut into parts of `size`; the last may be shorter."""
        count = math.ceil(len(self.ids) / size)
        parts = (count * [None] if x is None else x.split(size) for x in self)
        return (Batch(*part) for part in zip(*parts, strict=True))

    def chunks(self, count: int) -> Iterator["Batch"]:
        """Cut into `count` parts, as equal as can be (see `shares`)."""
        sizes = [len(part) for part in shares(range(len(self.ids)), count)]
        parts = (count * [None] if x is None else x.split(sizes) for x in self)
        return (Batch(*part) for part in zip(*parts, strict=True))


def shares(positions: range, count: int) -> list[range]:
    """A batch's positions in `count` parts, one after the other and as equal as can be.

    An even batch is cut between its pairs of neighbours, which augmentations may mix with one another.
    """
    unit = 2 if len(positions) % 2 == 0 else 1
    units = len(positions) // unit
    edges = [positions.start + units * part // count * unit for part in range(count + 1)]
    return [range(*ends) for ends in itertools.pairwise(edges)]


class Loader:
    """Makes the batches of a stream.

    Args:
        source, stream: the images and their order.
        image_size: height and width that crops are resized to.
        mean, std: of the channels.
        device: where batches go.
        workers: processes that decode.
        cached: uint8 [N, C, H, W] of the whole set on the device, from `load_all`, or None.
        report: called once for every image that was broken or converted.
        augment: what is done to training images beyond their views, in fine-tuning.
        labels: int64 [N], the class of each image, or None.
        views: how the one or two views of each training image are made; by default one, as `augment` says.
    """

    def __init__(
        self,
        source: Source,
        stream: SampleStream,
        image_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        workers: int,
        cached: CachedSet | None,
        report: Callable[[Report], None],
        augment: AugmentConfig | None = None,
        labels: Tensor | None = None,
        views: Sequence[View] = (),
    ) -> None:
        self.source, self.stream, self.image_size = source, stream, image_size
        self.labels = labels
        self.policy = augment.randaugment if augment else None
        self.erase_prob = augment.erase if augment else 0.0
        default = View(crop_min=augment.crop_min, flip=augment.flip) if augment else View()
        self.views = tuple(views) or (default,)
        assert len(self.views) <= 2
        self.fill = tuple(mean)
        # On the device already, so that no batch has to wait for the host.
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.device = device
        self.workers, self.cached, self.report = workers, cached, report

    def batches(self, parts: Iterable[range]) -> Generator[Batch, None, None]:
        """One batch for each range of positions of the stream, in order.

        Raises:
            RunError: if an image and all that could stand in for it are broken.
        """
        if self.cached is not None:
            for part in parts:
                yield self._from_cache(torch.arange(part.start, part.stop))
            return
        loader = DataLoader(
            _StreamedSamples(self.source, self.stream, self.image_size, self.policy, self.fill, self.views),
            batch_sampler=_Parts(parts),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals if self.workers else None,
            prefetch_factor=4 if self.workers else None,
        )
        with watched(iter(loader)) as samples:
            for collated in samples:
                if isinstance(collated, Exception):
                    raise collated
                pixels, ids, epochs, shown, reports = collated
                for report in reports:
                    self.report(report)
                pixels, ids, epochs = (x.to(self.device, non_blocking=True) for x in (pixels, ids, epochs))
                yield self._batch([to_float(view) for view in pixels.unbind(1)], ids, epochs, shown)

    def held_out(self) -> Batch | None:
        """The held-out images, cut to the largest central box; broken ones are left out."""
        kept: list[tuple[int, Tensor]] = []
        for sample, picture, reports in read_many(self.source, self.stream.held_out().tolist(), self.workers):
            for report in reports:
                self.report(report)
            if picture is not None:
                kept.append((sample, central(picture.pixels, self.image_size)))
        if not kept:
            return None
        ids = torch.tensor([sample for sample, _ in kept])
        pixels, ids = (x.to(self.device) for x in (stack([pixels for _, pixels in kept]), ids))
        labels = None if self.labels is None else self.labels[[sample for sample, _ in kept]].to(self.device)
        images = normalise(to_float(pixels), self.mean, self.std)
        return Batch(images, ids, torch.zeros_like(ids), labels)

    def _from_cache(self, positions: Tensor) -> Batch:
        assert self.cached is not None
        epochs, ids = self.stream.at(positions)
        shown = self.cached.rows(self.stream, epochs, ids)
        images = self.cached.images[shown.to(self.device, non_blocking=True)]
        sizes = torch.tensor(images.shape[2:]).expand(len(ids), 2)
        crops = []
        for number, view in enumerate(self.views):
            placed = boxes_of(view, number, self.image_size, self.stream.seed, epochs, ids, sizes)
            boxes, flips = (x.to(self.device, non_blocking=True) for x in placed)
            crops.append(crop_resize_batch(images, boxes, flips, self.image_size) / 255)
        ids, epochs = (x.to(self.device, non_blocking=True) for x in (ids, epochs))
        return self._batch(crops, ids, epochs, shown)

    def _batch(self, crops: Sequence[Tensor], ids: Tensor, epochs: Tensor, shown: Tensor) -> Batch:
        """Crops float [B, C, H, W] in [0, 1] of each view, with what is done on the device, and the labels of
        the pictures that are `shown`."""
        finished = []
        for number, (view, images) in enumerate(zip(self.views, crops, strict=True)):
            if view.colors is not None:
                images = distort(images, view.colors, number, self.stream.seed, epochs, ids)  # noqa: PLW2901
            finished.append(normalise(images, self.mean, self.std))
        if self.erase_prob:
            finished[0] = erase(finished[0], self.erase_prob, self.stream.seed, epochs, ids)
        labels = None if self.labels is None else self.labels[shown].to(self.device, non_blocking=True)
        return Batch(finished[0], ids, epochs, labels, *finished[1:])


def central(pixels: Tensor, image_size: Sequence[int], crop_pct: float = 1.0) -> Tensor:
    """One image [C, H, W] cut to a share of the largest central box of the wanted shape, and resized."""
    box = eval_box(pixels.shape[1], pixels.shape[2], image_size, crop_pct)
    return crop_resize(pixels, box, image_size)


def stack(images: Sequence[Tensor]) -> Tensor:
    """[B, C, H, W]: uint8 if all of them are, else float32 in [0, 1]."""
    if any(image.dtype != torch.uint8 for image in images):
        images = [to_float(image) for image in images]
    return torch.stack(list(images))


class _Parts(Sampler[list[int]]):
    """Ranges of positions, as the lists that a DataLoader wants, each made when its turn comes."""

    def __init__(self, parts: Iterable[range]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.parts)


class _StreamedSamples(Dataset):
    """Decodes and augments the samples at positions of the stream, in a worker."""

    def __init__(
        self,
        source: Source,
        stream: SampleStream,
        image_size: Sequence[int],
        policy: str | None,
        fill: tuple[float, ...],
        views: Sequence[View],
    ) -> None:
        self.source, self.stream, self.image_size = source, stream, image_size
        self.policy, self.fill, self.views = policy, fill, views

    def __getitems__(self, positions: Sequence[int]) -> "list[_Sample] | list[Exception]":
        try:
            return self._samples(positions)
        except (UserError, RunError) as error:  # raised in the main process, where it is told well
            return [error]

    def _samples(self, positions: Sequence[int]) -> "list[_Sample]":
        epochs, ids = self.stream.at(torch.tensor(positions))
        parts = zip(epochs.split(_OPEN), ids.split(_OPEN), strict=True)
        return [sample for part in parts for sample in self._cropped(*part)]

    def _cropped(self, epochs: Tensor, ids: Tensor) -> "list[_Sample]":
        """The samples int64 [B]: opened together, so that all their boxes are drawn at once."""
        slots = list(zip(ids.tolist(), epochs.tolist(), strict=True))
        reports: list[list[Report]] = [[] for _ in slots]
        tries = [
            opened(self.source, self.stream, *slot, told) for slot, told in zip(slots, reports, strict=True)
        ]
        images = [next(candidates) for candidates in tries]
        samples: list[_Sample | None] = [None] * len(slots)
        while missing := [place for place, sample in enumerate(samples) if sample is None]:
            sizes = torch.tensor([images[place][1].size for place in missing])
            placed = [
                boxes_of(
                    *(view, number, self.image_size, self.stream.seed, epochs[missing], ids[missing], sizes)
                )
                for number, view in enumerate(self.views)
            ]
            for row, place in enumerate(missing):
                shown, image = images[place]
                boxes = [boxes[row].tolist() for boxes, _ in placed]
                views = self._views(image, shown, boxes, reports[place])
                if views is None:  # what had opened well could not be decoded
                    images[place] = next(tries[place])
                    continue
                turned = [
                    self._augmented(pixels, bool(flips[row]), *slots[place])
                    for pixels, (_, flips) in zip(views, placed, strict=True)
                ]
                samples[place] = _Sample(torch.stack(turned), *slots[place], shown, reports[place])
        return [sample for sample in samples if sample is not None]

    def _views(
        self, image: Croppable, shown: int, boxes: Sequence[Sequence[int]], reports: list[Report]
    ) -> list[Tensor] | None:
        """The boxes of an image, resized; None if it is broken. What was done to it is told once."""
        first = attempt_picture(self.source, shown, partial(image.crop, boxes[0], self.image_size), reports)
        others = [
            attempt(self.source, shown, partial(image.crop, box, self.image_size), reports)
            for box in boxes[1:]
            if first is not None
        ]
        pictures = [picture.pixels for picture in (first, *others) if picture is not None]
        return pictures if len(pictures) == len(boxes) else None

    def _augmented(self, pixels: Tensor, flip: bool, sample: int, epoch: int) -> Tensor:
        pixels = pixels.flip(2) if flip else pixels
        if self.policy is None:
            return pixels
        return randaugment(pixels, self.policy, self.fill, self.stream.seed, epoch, sample)


class _Sample(NamedTuple):
    pixels: Tensor
    """[views, C, H, W]"""
    id: int
    epoch: int
    shown: int
    """The sample whose picture it is: another one if the sample is broken."""
    reports: list[Report]


def _collate(
    samples: list[_Sample] | list[Exception],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Report]] | Exception:
    if isinstance(samples[0], Exception):
        return samples[0]
    pixels, ids, epochs, shown, reports = zip(*samples, strict=True)
    numbers = [torch.tensor(x) for x in (ids, epochs, shown)]
    return stack(pixels), numbers[0], numbers[1], numbers[2], [r for many in reports for r in many]


def ignore_signals(_worker: int) -> None:
    """The main process decides when to stop; its workers end with it."""
    # Slurm sends its warning, one of the last two, to every process of a job.
    for number in (SIGINT, SIGTERM, SIGUSR1, SIGUSR2):
        signal(number, SIG_IGN)
