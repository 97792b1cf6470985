"""Read samples, and choose a replacement for one that is broken."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import BadSampleError, Croppable, DecodedImage, Source, open_croppable
from quarterview.errors import RunError, UserError

_MAX_REPLACEMENTS = 32
_CHUNK_SIZE = 256
_NUM_TIMED = 8
_FAST_SECONDS = 2e-4  # below this, handing an image to a thread takes longer than decoding it

T = TypeVar("T")


@runtime_checkable
class BulkSource(Protocol):
    """A source that produces many images at once faster than one by one, such as generated images."""

    def images(self, ids: Tensor) -> Tensor:
        """Return the images uint8 [B, C, H, W] of the samples int64 [B]."""
        ...


class SampleReport(NamedTuple):
    """A remark on one sample: that it is broken, or how it was converted."""

    sample_id: int
    name: str
    broken: str | None
    """Why the sample cannot be used; None if it can."""
    notes: tuple[str, ...] = ()
    """The conversions that were applied to it."""


def open_candidates(
    source: Source, stream: SampleStream, sample_id: int, epoch: int, reports: list[SampleReport]
) -> Iterator[tuple[int, Croppable]]:
    """Open a sample, and then its replacements, and yield the id and the opened image of each.

    Samples that cannot be opened are skipped and added to `reports`. The caller takes the first one that
    can be decoded.

    Raises:
        RunError: if no replacement is left.
    """
    for candidate in iterate_candidates(stream, sample_id, epoch, reports):
        image = try_read(
            source, candidate, lambda candidate=candidate: open_croppable(source, candidate), reports
        )
        if image is not None:
            yield candidate, image


def read_sample(source: Source, sample_id: int) -> tuple[DecodedImage | None, list[SampleReport]]:
    """Decode one sample. Return the image, or None if it is broken, and the remarks on it."""
    reports: list[SampleReport] = []
    return try_decode(source, sample_id, lambda: source.image(sample_id), reports), reports


def try_decode(
    source: Source, sample_id: int, decode: Callable[[], DecodedImage], reports: list[SampleReport]
) -> DecodedImage | None:
    """Return the image that `decode` returns, or None if it is broken; add its notes to `reports`."""
    image = try_read(source, sample_id, decode, reports)
    if image is not None and image.notes:
        reports.append(SampleReport(sample_id, source.name(sample_id), None, image.notes))
    return image


def try_read(source: Source, sample_id: int, load: Callable[[], T], reports: list[SampleReport]) -> T | None:
    """Return what `load` returns, or None if the sample is broken, which is added to `reports`."""
    try:
        return load()
    except BadSampleError as error:
        reports.append(SampleReport(sample_id, source.name(sample_id), str(error)))
        return None
    except UserError as error:
        raise UserError(f"{source.name(sample_id)}: {error}") from None


def iterate_candidates(
    stream: SampleStream, sample_id: int, epoch: int, reports: Sequence[SampleReport] = ()
) -> Iterator[int]:
    """Yield the sample itself, and then its replacements.

    Args:
        reports: why the earlier ones could not be read, for the error message.

    Raises:
        RunError: after 32 replacements.
    """
    yield sample_id
    for attempt in range(_MAX_REPLACEMENTS):
        yield stream.get_replacement(epoch, sample_id, attempt)
    raise RunError(
        f"Cannot read sample {sample_id} nor any of {_MAX_REPLACEMENTS} replacements"
        + "".join(f"; {report.name}: {report.broken}" for report in reports[-3:])
        + ". Check that the images can still be reached and are not broken."
    )


def read_samples(
    source: Source, sample_ids: Sequence[int], num_threads: int
) -> Iterator[tuple[int, DecodedImage | None, list[SampleReport]]]:
    """Yield the id and the result of `read_sample` of each sample in order, in threads if that is faster."""
    if isinstance(source, BulkSource):
        for chunk in (
            sample_ids[start : start + _CHUNK_SIZE] for start in range(0, len(sample_ids), _CHUNK_SIZE)
        ):
            for sample_id, pixels in zip(chunk, source.images(torch.tensor(chunk)), strict=True):
                yield sample_id, DecodedImage(pixels), []
        return
    times = []
    for sample_id in sample_ids[:_NUM_TIMED]:
        start = time.perf_counter()
        result = read_sample(source, sample_id)
        times.append(time.perf_counter() - start)
        yield sample_id, *result
    if not times:
        return
    rest = sample_ids[_NUM_TIMED:]
    if num_threads <= 1 or median(times) < _FAST_SECONDS:
        for sample_id in rest:
            yield sample_id, *read_sample(source, sample_id)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(rest), _CHUNK_SIZE):
            chunk = rest[start : start + _CHUNK_SIZE]
            results = pool.map(lambda i: read_sample(source, i), chunk)
            for sample_id, (image, reports) in zip(chunk, results, strict=True):
                yield sample_id, image, reports
