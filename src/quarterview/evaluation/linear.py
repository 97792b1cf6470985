"""The fast linear probe: logistic regression on frozen features that are computed once."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quarterview.evaluation.features import Features
from quarterview.evaluation.labelled import check_classes
from quarterview.evaluation.statistics import compute_accuracy_metrics

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

C_VALUES = (0.001, 0.01, 0.1, 1.0)
"""Inverse regularisation strengths that are tried: the argument `C` of scikit-learn's LogisticRegression."""
HELD_OUT_FRACTION = 0.2
"""Fraction of the training images on which `C` is chosen."""
_MAX_ITER = 300


class FittedLogisticRegression(NamedTuple):
    """A fitted logistic regression on standardised features."""

    pipeline: "Pipeline"
    c: float
    """The chosen inverse regularisation strength."""

    def predict(self, test: Tensor) -> Tensor:
        """Return the predicted class of each test feature: float [M, D] -> int64 [M]."""
        return torch.from_numpy(self.pipeline.predict(test.numpy()))


@dataclass(frozen=True)
class LogisticRegression:
    """A linear classifier of standardised features: a `FeatureEvaluator`.

    The regularisation is chosen on a held-out fifth of the training images; the classifier is then fitted to
    all training images. The test images are used once, at the end.
    """

    seed: int = 0
    """Seed of the choice of the held-out images."""

    def fit(self, train: Tensor, labels: Tensor) -> FittedLogisticRegression:
        """Choose the regularisation and fit the classifier.

        Args:
            train: float [N, D].
            labels: int64 [N].

        Raises:
            UserError: if there are fewer than two classes.
        """
        check_classes(labels)
        c = choose_c(train.numpy(), labels.numpy(), self.seed)
        return FittedLogisticRegression(fit_pipeline(train.numpy(), labels.numpy(), c), c)

    def predict(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        """Return the predicted class of each test feature.

        Args:
            train: float [N, D].
            labels: int64 [N].
            test: float [M, D].

        Returns:
            int64 [M].

        Raises:
            UserError: if there are fewer than two classes.
        """
        return self.fit(train, labels).predict(test)

    def __call__(self, features: Features) -> Iterator[tuple[str, float]]:
        fitted = self.fit(features.train, features.train_labels)
        yield from compute_accuracy_metrics(fitted.predict(features.test) == features.test_labels)
        yield "strength", fitted.c


def choose_c(features: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """Return the value of `C_VALUES` with the best accuracy on a held-out fifth of the training features.

    With fewer than 10 features, or one class after the split, it is the last of `C_VALUES`.
    """
    from sklearn.model_selection import train_test_split  # takes seconds to import

    counts = np.bincount(labels)
    smallest = counts[counts > 0].min()
    can_stratify = smallest >= 2 and len(labels) * HELD_OUT_FRACTION >= len(counts[counts > 0])
    if len(labels) < 10:
        return C_VALUES[-1]
    split = train_test_split(
        features,
        labels,
        test_size=HELD_OUT_FRACTION,
        random_state=seed,
        stratify=labels if can_stratify else None,
    )
    train, held_out, train_labels, held_out_labels = split
    if len(set(train_labels)) < 2:
        return C_VALUES[-1]
    scores = [fit_pipeline(train, train_labels, c).score(held_out, held_out_labels) for c in C_VALUES]
    return C_VALUES[int(np.argmax(scores))]


def fit_pipeline(features: np.ndarray, labels: np.ndarray, c: float) -> "Pipeline":
    """Fit a multinomial logistic regression on standardised features: float [N, D] and int64 [N]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=_MAX_ITER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterations do not change the accuracy
        return classifier.fit(features, labels)
