"""What can be told to the examination of a run."""

from typing import Annotated, Literal

from quarterview.config import FIRST, PATH, POSITIONAL, Ge, Text, Texts, part

MIN_IMAGES = 8
"""Fewer images than this say nothing."""


@part
class DoctorConfig:
    """Is my run working? The model beside trivial inpainters, its features, its history, its images."""

    run: Annotated[Text, POSITIONAL, PATH]
    """The folder of a run, finished or not."""
    data: Annotated[Texts, FIRST, PATH] = ()
    """The images of the run, if they are not where they were."""
    images: Annotated[int | None, Ge(MIN_IMAGES)] = None
    """How many held-out images, and as many training images, are looked at; by default 256, and fewer,
    down to 48, of more than 128 × 128 pixels."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
