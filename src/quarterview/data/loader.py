"""Batches of the sample stream: from workers that decode, or from a copy on the device.

What a batch contains depends on its positions in the stream alone, never on how it was fetched.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from signal import SIG_IGN, SIGINT, SIGTERM, signal
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from quarterview.data.augment import (
    crop_resize,
    crop_resize_batch,
    eval_box,
    normalise,
    random_crops,
    to_float,
)
from quarterview.data.cache import CachedSet
from quarterview.data.fetch import Report, fetch, read_many
from quarterview.data.source import Source
from quarterview.data.stream import SampleStream
from quarterview.errors import RunError, UserError, check_types

CacheKind = Literal["auto", "device", "none"]


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they reach the model."""

    data: tuple[str, ...] = ()
    """Images: folders, .txt lists of paths, parquet, .npy/.npz arrays, torchvision:NAME, or shapes."""
    cache: CacheKind = "auto"
    """Hold the whole set on the device (device), stream it through workers (none), or decide: 8-bit
    sets of one image size under 2 GiB are held (auto)."""
    workers: int | None = None
    """Processes that decode images; by default one a core, eight at most. 0 decodes in the main process."""
    holdout: int | None = None
    """Images never trained on, for val_loss and the panel; by default 1%, at most 512."""
    max_bad_samples: float = 0.01
    """Share of broken images above which the run stops. Broken images are replaced and recorded."""

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "data", (self.data,) if isinstance(self.data, str) else tuple(map(str, self.data))
        )
        check_types(self, DataConfig)
        if self.workers is not None and self.workers < 0:
            raise UserError(f"{self.workers} workers; accepted: 0 or more")
        if self.holdout is not None and self.holdout < 0:
            raise UserError(f"a holdout of {self.holdout}; accepted: 0 or more")
        if not 0 <= self.max_bad_samples <= 1:
            raise UserError(f"a share of bad samples of {self.max_bad_samples}; accepted: 0 to 1")


class Batch(NamedTuple):
    """What an objective is given."""

    images: Tensor
    """float32 [B, C, H, W], normalised, on the device."""
    ids: Tensor
    """int64 [B], on the device: the samples."""
    epochs: Tensor
    """int64 [B], on the device: the epoch each sample is seen in."""

    def chunks(self, count: int) -> Iterator["Batch"]:
        """Cut into `count` equal parts."""
        parts = (x.chunk(count) for x in self)
        return (Batch(*part) for part in zip(*parts, strict=True))


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
    ) -> None:
        self.source, self.stream, self.image_size = source, stream, image_size
        # On the device already, so that no batch has to wait for the host.
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.device = device
        self.workers, self.cached, self.report = workers, cached, report

    def batches(self, parts: Iterable[range]) -> Iterator[Batch]:
        """One batch for each range of positions of the stream, in order.

        Raises:
            RunError: if an image and all that could stand in for it are broken.
        """
        if self.cached is not None:
            for part in parts:
                yield self._from_cache(torch.arange(part.start, part.stop))
            return
        loader = DataLoader(
            _StreamedSamples(self.source, self.stream, self.image_size),
            batch_sampler=_Parts(parts),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_signals if self.workers else None,
            prefetch_factor=4 if self.workers else None,
        )
        samples: Any = iter(loader)
        try:
            for collated in samples:
                if isinstance(collated, Exception):
                    raise collated
                pixels, ids, epochs, reports = collated
                for report in reports:
                    self.report(report)
                yield self._to_device(pixels, ids, epochs)
        finally:  # an error's traceback would keep them alive, and as they ignore SIGTERM, Python at its exit
            if self.workers:
                samples._shutdown_workers()

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
        return self._to_device(stack([pixels for _, pixels in kept]), ids, torch.zeros_like(ids))

    def _to_device(self, pixels: Tensor, ids: Tensor, epochs: Tensor) -> Batch:
        pixels, ids, epochs = (x.to(self.device, non_blocking=True) for x in (pixels, ids, epochs))
        return Batch(normalise(to_float(pixels), self.mean, self.std), ids, epochs)

    def _from_cache(self, positions: Tensor) -> Batch:
        assert self.cached is not None
        epochs, ids = self.stream.at(positions)
        images = self.cached.images
        sizes = torch.tensor(images.shape[2:]).expand(len(ids), 2)
        boxes, flips = random_crops(self.stream.seed, epochs, ids, sizes)
        rows = self.cached.rows(self.stream, epochs, ids)
        rows, boxes, flips = (x.to(self.device, non_blocking=True) for x in (rows, boxes, flips))
        crops = crop_resize_batch(images[rows], boxes, flips, self.image_size)
        return Batch(
            normalise(crops / 255, self.mean, self.std),
            ids.to(self.device, non_blocking=True),
            epochs.to(self.device, non_blocking=True),
        )


def central(pixels: Tensor, image_size: Sequence[int]) -> Tensor:
    """One image [C, H, W] cut to the largest central box of the wanted shape, and resized."""
    return crop_resize(pixels, eval_box(pixels.shape[1], pixels.shape[2], image_size), image_size)


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

    def __init__(self, source: Source, stream: SampleStream, image_size: Sequence[int]) -> None:
        self.source, self.stream, self.image_size = source, stream, image_size

    def __getitems__(self, positions: Sequence[int]) -> "list[_Sample] | list[Exception]":
        try:
            return self._samples(positions)
        except (UserError, RunError) as error:  # raised in the main process, where it is told well
            return [error]

    def _samples(self, positions: Sequence[int]) -> "list[_Sample]":
        epochs, ids = self.stream.at(torch.tensor(positions))
        slots = list(zip(ids.tolist(), epochs.tolist(), strict=True))
        fetched = [fetch(self.source, self.stream, sample, epoch) for sample, epoch in slots]
        sizes = torch.tensor([picture.pixels.shape[1:] for picture, _ in fetched])
        boxes, flips = random_crops(self.stream.seed, epochs, ids, sizes)
        return [
            _Sample(crop_resize(picture.pixels, box, self.image_size, flip), *slot, reports)
            for (picture, reports), box, flip, slot in zip(
                fetched, boxes.tolist(), flips.tolist(), slots, strict=True
            )
        ]


class _Sample(NamedTuple):
    pixels: Tensor
    id: int
    epoch: int
    reports: list[Report]


def _collate(
    samples: list[_Sample] | list[Exception],
) -> tuple[Tensor, Tensor, Tensor, list[Report]] | Exception:
    if isinstance(samples[0], Exception):
        return samples[0]
    pixels, ids, epochs, reports = zip(*samples, strict=True)
    return stack(pixels), torch.tensor(ids), torch.tensor(epochs), [r for many in reports for r in many]


def _ignore_signals(_worker: int) -> None:
    """The main process decides when to stop; its workers end with it."""
    signal(SIGINT, SIG_IGN)
    signal(SIGTERM, SIG_IGN)
