"""Accuracy and its standard error."""

import math
from collections.abc import Iterator

from torch import Tensor


def compute_standard_error(accuracy: float, count: int) -> float:
    """Return the binomial standard error of an accuracy that was measured on `count` test images."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def compute_accuracy_metrics(correct: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the accuracy and its standard error, each as (name, value).

    Args:
        correct: bool [M], True for test images that are classified correctly.
    """
    accuracy = float(correct.double().mean())
    yield "accuracy", accuracy
    yield "standard_error", compute_standard_error(accuracy, len(correct))
