"""What every way of judging frozen features offers."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from quarterview.evaluation.features import Features


class Evaluator(Protocol):
    """One way of judging frozen features, such as `Knn` or `LogisticRegression`.

    `predict` is its core: whoever needs to know which test images are classified right compares its result
    with their labels.
    """

    def predict(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        """The class of each test feature, learned from training features and their labels.

        Args:
            train: float32 [N, D].
            labels: int64 [N].
            test: float32 [M, D].

        Returns:
            int64 [M].
        """
        ...

    def __call__(self, features: Features) -> Iterator[tuple[str, float]]:
        """Yield the name and the value of each figure: accuracy, standard_error, and what else there is."""
        ...
