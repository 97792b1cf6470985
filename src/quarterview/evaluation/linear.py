"""A linear classifier on frozen features, fast: features once, then a logistic regression."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quarterview.evaluation.features import Features
from quarterview.evaluation.labelled import check_classes
from quarterview.evaluation.statistics import figures

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Inverse regularisation strengths that are tried."""
HELD_OUT = 0.2
_ITERATIONS = 300


class FittedRegression(NamedTuple):
    """A logistic regression on standardised features, fitted."""

    pipeline: "Pipeline"
    strength: float
    """The inverse regularisation that was chosen."""

    def predict(self, test: Tensor) -> Tensor:
        """The class of each test feature: float [M, D] -> int64 [M]."""
        return torch.from_numpy(self.pipeline.predict(test.numpy()))


@dataclass(frozen=True)
class LogisticRegression:
    """A linear classifier of standardised features: an `Evaluator`.

    The regularisation is chosen on a fifth of the training images, and the classifier fitted again to all of
    them. The test images are used once, at the end.
    """

    seed: int = 0
    """Seed of the choice of the fifth."""

    def fit(self, train: Tensor, labels: Tensor) -> FittedRegression:
        """Choose the regularisation and fit, to float [N, D] and int64 [N].

        Raises:
            UserError: if there are fewer than two classes.
        """
        check_classes(labels)
        strength = choose_strength(train.numpy(), labels.numpy(), self.seed)
        return FittedRegression(fit(train.numpy(), labels.numpy(), strength), strength)

    def predict(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        """The class of each test feature.

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
        yield from figures(fitted.predict(features.test) == features.test_labels)
        yield "strength", fitted.strength


def choose_strength(features: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """The regularisation that does best on a held-out fifth of the training features."""
    from sklearn.model_selection import train_test_split  # here, for it takes seconds to import

    counts = np.bincount(labels)
    smallest = counts[counts > 0].min()
    enough = smallest >= 2 and len(labels) * HELD_OUT >= len(counts[counts > 0])
    if len(labels) < 10:
        return STRENGTHS[-1]
    parts = train_test_split(
        features, labels, test_size=HELD_OUT, random_state=seed, stratify=labels if enough else None
    )
    fitted, judged, fitted_labels, judged_labels = parts
    if len(set(fitted_labels)) < 2:
        return STRENGTHS[-1]
    scores = [fit(fitted, fitted_labels, s).score(judged, judged_labels) for s in STRENGTHS]
    return STRENGTHS[int(np.argmax(scores))]


def fit(features: np.ndarray, labels: np.ndarray, strength: float) -> "Pipeline":
    """Standardised features and a multinomial logistic regression."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterations change no figure
        return classifier.fit(features, labels)
