"""Batches of the sample stream, decoded by worker processes or taken from a dataset on the device.

The contents of a batch depend only on its positions in the stream, not on how its images are loaded.
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

from quarterview.data.cache import CachedDataset
from quarterview.data.config import AugmentConfig, View
from quarterview.data.reading import SampleReport, open_candidates, read_samples, try_decode, try_read
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Croppable, Source
from quarterview.data.transforms.crop import (
    crop_resize,
    crop_resize_batch,
    get_center_box,
    normalize,
    to_float,
)
from quarterview.data.transforms.randaugment import apply_randaugment, apply_random_erasing
from quarterview.data.transforms.views import distort_colors, draw_view_crops
from quarterview.data.workers import watch_workers
from quarterview.errors import RunError, UserError

_MAX_OPEN_IMAGES = 32
"""Maximum number of images that a worker keeps open at the same time, encoded or decoded."""


class Batch(NamedTuple):
    """A batch of training or held-out images, on the device."""

    images: Tensor
    """float32 [B, C, H, W], normalised."""
    ids: Tensor
    """int64 [B], the id of each sample. A broken sample keeps its id, and shows its replacement."""
    epochs: Tensor
    """int64 [B], the epoch of each sample."""
    labels: Tensor | None = None
    """int64 [B], the class of each image; None if the loader has no labels."""
    second_view: Tensor | None = None
    """float32 [B, C, H, W], the second view of each image; None if the loader makes one view."""

    def split(self, split_size: int) -> Iterator["Batch"]:
        """Split into batches of `split_size`. The last may be smaller."""
        num_parts = math.ceil(len(self.ids) / split_size)
        parts = (num_parts * [None] if x is None else x.split(split_size) for x in self)
        return (Batch(*part) for part in zip(*parts, strict=True))

    def chunk(self, num_chunks: int) -> Iterator["Batch"]:
        """Split into `num_chunks` batches of nearly equal size, see `split_evenly`."""
        sizes = [len(part) for part in split_evenly(range(len(self.ids)), num_chunks)]
        parts = (num_chunks * [None] if x is None else x.split(sizes) for x in self)
        return (Batch(*part) for part in zip(*parts, strict=True))


def split_evenly(positions: range, num_parts: int) -> list[range]:
    """Split the positions of a batch into `num_parts` contiguous ranges of nearly equal size.

    If the number of positions is even, the pairs (0, 1), (2, 3), … stay together, because mixup and CutMix
    mix them.
    """
    unit = 2 if len(positions) % 2 == 0 else 1
    units = len(positions) // unit
    edges = [positions.start + units * part // num_parts * unit for part in range(num_parts + 1)]
    return [range(*ends) for ends in itertools.pairwise(edges)]


class Loader:
    """Loads the batches of a sample stream.

    Args:
        source: the images.
        stream: the order of the images.
        image_size: height and width of the resized crops.
        mean, std: channel statistics, of pixels in [0, 1].
        device: the device of the batches.
        num_workers: number of processes that decode.
        cache: the dataset on the device, from `load_cached_dataset`, or None to decode each batch.
        on_report: called for each image that is broken or was converted.
        augment: augmentation of training images in fine-tuning, or None.
        labels: int64 [N], the class of each image, or None.
        views: parameters of the one or two views of each training image. Default: one view, with the crops
            and flips of `augment`.
    """

    def __init__(
        self,
        source: Source,
        stream: SampleStream,
        image_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        num_workers: int,
        cache: CachedDataset | None,
        on_report: Callable[[SampleReport], None],
        augment: AugmentConfig | None = None,
        labels: Tensor | None = None,
        views: Sequence[View] = (),
    ) -> None:
        self.source, self.stream, self.image_size = source, stream, image_size
        self.labels = labels
        self.randaugment_policy = augment.randaugment if augment else None
        self.erase_prob = augment.erase_prob if augment else 0.0
        default = View(crop_min=augment.crop_min, flip=augment.flip) if augment else View()
        self.views = tuple(views) or (default,)
        assert len(self.views) <= 2
        self.fill_color = tuple(mean)
        # On the device already, so that no batch waits for a copy from the host.
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.device = device
        self.num_workers, self.cache, self.on_report = num_workers, cache, on_report

    def iter_batches(self, position_ranges: Iterable[range]) -> Generator[Batch, None, None]:
        """Yield one batch for each range of positions of the stream, in order.

        Raises:
            RunError: if an image and all its replacements are broken.
        """
        if self.cache is not None:
            for part in position_ranges:
                yield self._load_cached_batch(torch.arange(part.start, part.stop))
            return
        loader = DataLoader(
            _StreamDataset(
                self.source,
                self.stream,
                self.image_size,
                self.randaugment_policy,
                self.fill_color,
                self.views,
            ),
            batch_sampler=_RangeBatchSampler(position_ranges),
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals if self.num_workers else None,
            prefetch_factor=4 if self.num_workers else None,
        )
        with watch_workers(iter(loader)) as samples:
            for collated in samples:
                if isinstance(collated, Exception):
                    raise collated
                pixels, ids, epochs, image_ids, reports = collated
                for report in reports:
                    self.on_report(report)
                pixels, ids, epochs = (x.to(self.device, non_blocking=True) for x in (pixels, ids, epochs))
                yield self._make_batch([to_float(view) for view in pixels.unbind(1)], ids, epochs, image_ids)

    def load_held_out(self) -> Batch | None:
        """Load all held-out images as center crops, without the broken ones; None if none can be read."""
        kept: list[tuple[int, Tensor]] = []
        for sample, image, reports in read_samples(
            self.source, self.stream.get_held_out_ids().tolist(), self.num_workers
        ):
            for report in reports:
                self.on_report(report)
            if image is not None:
                kept.append((sample, resized_center_crop(image.pixels, self.image_size)))
        if not kept:
            return None
        ids = torch.tensor([sample for sample, _ in kept])
        pixels, ids = (x.to(self.device) for x in (stack_images([pixels for _, pixels in kept]), ids))
        labels = None if self.labels is None else self.labels[[sample for sample, _ in kept]].to(self.device)
        images = normalize(to_float(pixels), self.mean, self.std)
        return Batch(images, ids, torch.zeros_like(ids), labels)

    def _load_cached_batch(self, positions: Tensor) -> Batch:
        assert self.cache is not None
        epochs, ids = self.stream.get_samples(positions)
        image_ids = self.cache.replace_broken(self.stream, epochs, ids)
        images = self.cache.images[image_ids.to(self.device, non_blocking=True)]
        sizes = torch.tensor(images.shape[2:]).expand(len(ids), 2)
        crops = []
        for view_index, view in enumerate(self.views):
            view_crops = draw_view_crops(
                view, view_index, self.image_size, self.stream.seed, epochs, ids, sizes
            )
            boxes, flips = (x.to(self.device, non_blocking=True) for x in view_crops)
            crops.append(crop_resize_batch(images, boxes, flips, self.image_size) / 255)
        ids, epochs = (x.to(self.device, non_blocking=True) for x in (ids, epochs))
        return self._make_batch(crops, ids, epochs, image_ids)

    def _make_batch(self, crops: Sequence[Tensor], ids: Tensor, epochs: Tensor, image_ids: Tensor) -> Batch:
        """Distort, normalise and erase the crops on the device, and add the labels.

        Args:
            crops: float [B, C, H, W] in [0, 1], for each view.
            image_ids: int64 [B], the samples whose images these are: replacements, for broken samples.
        """
        finished = []
        for view_index, (view, images) in enumerate(zip(self.views, crops, strict=True)):
            if view.colors is not None:
                images = distort_colors(images, view.colors, view_index, self.stream.seed, epochs, ids)  # noqa: PLW2901
            finished.append(normalize(images, self.mean, self.std))
        if self.erase_prob:
            finished[0] = apply_random_erasing(finished[0], self.erase_prob, self.stream.seed, epochs, ids)
        labels = None if self.labels is None else self.labels[image_ids].to(self.device, non_blocking=True)
        return Batch(finished[0], ids, epochs, labels, *finished[1:])


def resized_center_crop(image: Tensor, image_size: Sequence[int], crop_pct: float = 1.0) -> Tensor:
    """Crop one image [C, H, W] to the largest central box of the aspect ratio of `image_size`, and resize it.

    Args:
        crop_pct: sides of the box as a fraction of the largest ones.
    """
    box = get_center_box(image.shape[1], image.shape[2], image_size, crop_pct)
    return crop_resize(image, box, image_size)


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stack images [C, H, W] into a batch: uint8 if all images are uint8, otherwise float32 in [0, 1]."""
    if any(image.dtype != torch.uint8 for image in images):
        images = [to_float(image) for image in images]
    return torch.stack(list(images))


class _RangeBatchSampler(Sampler[list[int]]):
    """A batch sampler that yields the positions of each range as a list."""

    def __init__(self, position_ranges: Iterable[range]) -> None:
        self.position_ranges = position_ranges

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.position_ranges)


class _StreamDataset(Dataset):
    """A map-style dataset that decodes and augments the samples at positions of the stream."""

    def __init__(
        self,
        source: Source,
        stream: SampleStream,
        image_size: Sequence[int],
        randaugment_policy: str | None,
        fill_color: tuple[float, ...],
        views: Sequence[View],
    ) -> None:
        self.source, self.stream, self.image_size = source, stream, image_size
        self.randaugment_policy, self.fill_color, self.views = randaugment_policy, fill_color, views

    def __getitems__(self, positions: Sequence[int]) -> "list[_Sample] | list[Exception]":
        try:
            return self._load_samples(positions)
        except (
            UserError,
            RunError,
        ) as error:  # raised in the main process, which reports it without a worker's traceback
            return [error]

    def _load_samples(self, positions: Sequence[int]) -> "list[_Sample]":
        epochs, ids = self.stream.get_samples(torch.tensor(positions))
        parts = zip(epochs.split(_MAX_OPEN_IMAGES), ids.split(_MAX_OPEN_IMAGES), strict=True)
        return [sample for part in parts for sample in self._load_chunk(*part)]

    def _load_chunk(self, epochs: Tensor, ids: Tensor) -> "list[_Sample]":
        """Load the samples int64 [B]. All images are opened first, so that their boxes are drawn at once."""
        slots = list(zip(ids.tolist(), epochs.tolist(), strict=True))
        reports: list[list[SampleReport]] = [[] for _ in slots]
        candidates = [
            open_candidates(self.source, self.stream, *slot, slot_reports)
            for slot, slot_reports in zip(slots, reports, strict=True)
        ]
        images = [next(images) for images in candidates]
        samples: list[_Sample | None] = [None] * len(slots)
        while missing := [index for index, sample in enumerate(samples) if sample is None]:
            sizes = torch.tensor([images[index][1].size for index in missing])
            view_crops = [
                draw_view_crops(
                    *(
                        view,
                        view_index,
                        self.image_size,
                        self.stream.seed,
                        epochs[missing],
                        ids[missing],
                        sizes,
                    )
                )
                for view_index, view in enumerate(self.views)
            ]
            for row, index in enumerate(missing):
                image_id, image = images[index]
                boxes = [boxes[row].tolist() for boxes, _ in view_crops]
                views = self._decode_crops(image, image_id, boxes, reports[index])
                if views is None:  # the image could be opened, but not decoded
                    images[index] = next(candidates[index])
                    continue
                augmented = [
                    self._augment(pixels, bool(flips[row]), *slots[index])
                    for pixels, (_, flips) in zip(views, view_crops, strict=True)
                ]
                samples[index] = _Sample(torch.stack(augmented), *slots[index], image_id, reports[index])
        return [sample for sample in samples if sample is not None]

    def _decode_crops(
        self, image: Croppable, image_id: int, boxes: Sequence[Sequence[int]], reports: list[SampleReport]
    ) -> list[Tensor] | None:
        """Decode the boxes of an image, resized; None if it is broken. Conversions are reported once."""
        first = try_decode(self.source, image_id, partial(image.crop, boxes[0], self.image_size), reports)
        others = [
            try_read(self.source, image_id, partial(image.crop, box, self.image_size), reports)
            for box in boxes[1:]
            if first is not None
        ]
        crops = [crop.pixels for crop in (first, *others) if crop is not None]
        return crops if len(crops) == len(boxes) else None

    def _augment(self, pixels: Tensor, flip: bool, sample: int, epoch: int) -> Tensor:
        pixels = pixels.flip(2) if flip else pixels
        if self.randaugment_policy is None:
            return pixels
        return apply_randaugment(
            pixels, self.randaugment_policy, self.fill_color, self.stream.seed, epoch, sample
        )


class _Sample(NamedTuple):
    pixels: Tensor
    """[views, C, H, W]"""
    id: int
    epoch: int
    image_id: int
    """The sample whose image this is: the replacement, if sample `id` is broken."""
    reports: list[SampleReport]


def _collate(
    samples: list[_Sample] | list[Exception],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[SampleReport]] | Exception:
    if isinstance(samples[0], Exception):
        return samples[0]
    pixels, ids, epochs, image_ids, reports = zip(*samples, strict=True)
    ids, epochs, image_ids = (torch.tensor(x) for x in (ids, epochs, image_ids))
    return (
        stack_images(pixels),
        ids,
        epochs,
        image_ids,
        [r for sample_reports in reports for r in sample_reports],
    )


def ignore_signals(_worker: int) -> None:
    """Ignore stop signals in a worker process: the main process decides when to stop."""
    # Slurm sends its warning signal, SIGUSR1 or SIGUSR2, to every process of a job.
    for signal_number in (SIGINT, SIGTERM, SIGUSR1, SIGUSR2):
        signal(signal_number, SIG_IGN)
