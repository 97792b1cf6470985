"""The common interface of the classifiers that evaluate frozen features."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from quarterview.evaluation.features import Features


class FeatureEvaluator(Protocol):
    """A classifier that evaluates frozen features, such as `Knn` or `LogisticRegression`.

    Calling it with features yields metrics. `predict` gives the prediction for each test image.
    """

    def predict(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        """Return the predicted class of each test feature, learned from training features and their labels.

        Args:
            train: float32 [N, D].
            labels: int64 [N].
            test: float32 [M, D].

        Returns:
            int64 [M].
        """
        ...

    def __call__(self, features: Features) -> Iterator[tuple[str, float]]:
        """Yield the name and the value of each metric, with accuracy and standard_error among them."""
        ...
