"""Configuration of ``quarterview doctor``."""

from typing import Annotated, Literal

from quarterview.config import FIRST, PATH, POSITIONAL, Ge, Text, Texts, part

MIN_IMAGES = 8
"""Minimum number of images for a meaningful loss."""


@part
class DoctorConfig:
    """Check a run: its loss compared with trivial inpainters, its features, training history and images."""

    run: Annotated[Text, POSITIONAL, PATH]
    """Folder of the run, finished or not."""
    data: Annotated[Texts, FIRST, PATH] = ()
    """Images of the run, if they have been moved."""
    images: Annotated[int | None, Ge(MIN_IMAGES)] = None
    """Number of held-out images, and of training images, to evaluate. Default: 256, and down to 48 for images
    of more than 128 × 128 pixels."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device for the computation."""
