"""One sample of a set, or what stands in for it when it is broken."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import BadSampleError, Croppable, Picture, Source, croppable
from quarterview.errors import RunError, UserError

_REPLACEMENT_ATTEMPTS = 32
_CHUNK = 256
_TRIED = 8
_QUICK = 2e-4  # seconds, below which handing an image to a thread takes longer than decoding it

Made = TypeVar("Made")


@runtime_checkable
class BulkSource(Protocol):
    """A source that makes many images at once faster than one by one, such as generated ones."""

    def images(self, ids: Tensor) -> Tensor:
        """uint8 [B, C, H, W] of the samples int64 [B]."""
        ...


class Report(NamedTuple):
    """What happened to one image on its way in."""

    sample: int
    name: str
    broken: str | None
    """Why it could not be used, or None."""
    notes: tuple[str, ...] = ()
    """What was done to it."""


def opened(
    source: Source, stream: SampleStream, sample: int, epoch: int, reports: list[Report]
) -> Iterator[tuple[int, Croppable]]:
    """A sample, then those that stand in for it should it be broken: which, and the image, opened.

    Those that cannot be opened are left out, and told in `reports`.

    Raises:
        RunError: when there are no more.
    """
    for candidate in candidates(stream, sample, epoch, reports):
        image = attempt(source, candidate, lambda candidate=candidate: croppable(source, candidate), reports)
        if image is not None:
            yield candidate, image


def read(source: Source, sample: int) -> tuple[Picture | None, list[Report]]:
    """Decode one sample and say what happened to it; None if it is broken."""
    reports: list[Report] = []
    return attempt_picture(source, sample, lambda: source.image(sample), reports), reports


def attempt_picture(
    source: Source, sample: int, make: Callable[[], Picture], reports: list[Report]
) -> Picture | None:
    """The picture that `make` makes of a sample, with its notes told in `reports`; None if it is broken."""
    picture = attempt(source, sample, make, reports)
    if picture is not None and picture.notes:
        reports.append(Report(sample, source.name(sample), None, picture.notes))
    return picture


def attempt(source: Source, sample: int, make: Callable[[], Made], reports: list[Report]) -> Made | None:
    """What `make` makes of a sample; None if it is broken, which is told in `reports`."""
    try:
        return make()
    except BadSampleError as error:
        reports.append(Report(sample, source.name(sample), str(error)))
        return None
    except UserError as error:
        raise UserError(f"{source.name(sample)}: {error}") from None


def candidates(
    stream: SampleStream, sample: int, epoch: int, reports: Sequence[Report] = ()
) -> Iterator[int]:
    """The sample itself, then those that stand in for it should it be broken.

    Args:
        reports: to which is added why they are broken, for the error.

    Raises:
        RunError: after 32 of them.
    """
    yield sample
    for attempt in range(_REPLACEMENT_ATTEMPTS):
        yield stream.replacement(epoch, sample, attempt)
    raise RunError(
        f"sample {sample} and {_REPLACEMENT_ATTEMPTS} others in its place could not be read"
        + "".join(f"; {report.name}: {report.broken}" for report in reports[-3:])
    )


def read_many(
    source: Source, samples: Sequence[int], threads: int
) -> Iterator[tuple[int, Picture | None, list[Report]]]:
    """What `read` gives for each sample, in order, several decoded at a time where that is faster."""
    if isinstance(source, BulkSource):
        for chunk in (samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)):
            for sample, pixels in zip(chunk, source.images(torch.tensor(chunk)), strict=True):
                yield sample, Picture(pixels), []
        return
    times = []
    for sample in samples[:_TRIED]:
        began = time.perf_counter()
        found = read(source, sample)
        times.append(time.perf_counter() - began)
        yield sample, *found
    if not times:
        return
    rest = samples[_TRIED:]
    if threads <= 1 or median(times) < _QUICK:
        for sample in rest:
            yield sample, *read(source, sample)
        return
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rest), _CHUNK):
            chunk = rest[start : start + _CHUNK]
            found = pool.map(lambda i: read(source, i), chunk)
            for sample, (picture, reports) in zip(chunk, found, strict=True):
                yield sample, picture, reports
