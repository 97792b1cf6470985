"""Accuracies and how far chance may have moved them."""

import math
from collections.abc import Iterator

from torch import Tensor


def standard_error(accuracy: float, count: int) -> float:
    """The standard error of an accuracy that was measured on `count` test images."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def figures(correct: Tensor) -> Iterator[tuple[str, float]]:
    """The accuracy and its standard error, by name.

    Args:
        correct: bool [M], which test images are classified right.
    """
    accuracy = float(correct.double().mean())
    yield "accuracy", accuracy
    yield "standard_error", standard_error(accuracy, len(correct))
