"""One sample of a set, or what stands in for it when it is broken."""

from collections.abc import Iterator
from typing import NamedTuple

from quarterview.data.source import BadSampleError, Picture, Source
from quarterview.data.stream import SampleStream
from quarterview.errors import RunError

_REPLACEMENT_ATTEMPTS = 32


class Report(NamedTuple):
    """What happened to one image on its way in."""

    sample: int
    name: str
    broken: str | None
    """Why it could not be used, or None."""
    notes: tuple[str, ...] = ()
    """What was done to it."""


def fetch(source: Source, stream: SampleStream, sample: int, epoch: int) -> tuple[Picture, list[Report]]:
    """Decode a sample, or the first of its replacements that is not broken, and say what happened."""
    reports: list[Report] = []
    for candidate in candidates(stream, sample, epoch):
        picture, said = read(source, candidate)
        reports += said
        if picture is not None:
            return picture, reports
    raise AssertionError("unreachable: candidates never end quietly")


def read(source: Source, sample: int) -> tuple[Picture | None, list[Report]]:
    """Decode one sample and say what happened to it; None if it is broken."""
    try:
        picture = source.image(sample)
    except BadSampleError as error:
        return None, [Report(sample, source.name(sample), str(error))]
    return picture, [Report(sample, source.name(sample), None, picture.notes)] if picture.notes else []


def candidates(stream: SampleStream, sample: int, epoch: int) -> Iterator[int]:
    """The sample itself, then those that stand in for it should it be broken.

    Raises:
        RunError: after 32 of them.
    """
    yield sample
    for attempt in range(_REPLACEMENT_ATTEMPTS):
        yield stream.replacement(epoch, sample, attempt)
    raise RunError(
        f"sample {sample} and {_REPLACEMENT_ATTEMPTS} others in its place could not be read; "
        "see bad_samples.jsonl in the run's folder for the reasons"
    )
