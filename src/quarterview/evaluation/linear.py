"""A linear classifier on frozen features, fast: features once, then a logistic regression."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quarterview.errors import UserError
from quarterview.evaluation.features import ProbeConfig, ProbeData, probe_data, record_probe
from quarterview.evaluation.report import show_accuracies, standard_error
from quarterview.training.logging import Journal

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Inverse regularisation strengths that are tried."""
HELD_OUT = 0.2
_ITERATIONS = 300


@dataclass(frozen=True)
class LinearAccuracy:
    """What a linear classifier reached on the features of one encoder."""

    accuracy: float
    standard_error: float
    strength: float
    """The inverse regularisation that was chosen."""


def linear(config: ProbeConfig, journal: Journal, argv: Sequence[str] = ()) -> dict[str, float]:
    """Fit a linear classifier to each encoder's training features, show a table and record the result.

    Features are standardised; the regularisation is chosen on a fifth of the training images and
    the classifier fitted again to all of them. The test images are used once, at the end.

    Args:
        argv: the command line, for the record.

    Returns:
        The accuracy of each encoder, by its name.

    Raises:
        UserError: if there are fewer than two classes.
    """
    data = probe_data(config)
    check_classes(data.train_labels)
    found = {name: linear_fit(data, name, config.seed) for name in data.train}
    accuracies = {name: fitted.accuracy for name, fitted in found.items()}
    kind = config.features or "mean"
    show_accuracies(f"linear classifier, {kind} features", accuracies, data, journal)
    record_probe(
        "linear",
        config,
        argv,
        {"features": kind, "strengths": STRENGTHS, "held_out": HELD_OUT},
        {**data.described, "unreadable": data.unreadable},
        {"classes": data.classes, "accuracies": {name: asdict(fitted) for name, fitted in found.items()}},
    )
    return accuracies


def check_classes(labels: Tensor) -> None:
    """Raises UserError if there is nothing to tell apart."""
    if len(labels.unique()) < 2:
        raise UserError("the labelled images are all of one class; accepted: two classes or more")


def linear_accuracy(data: ProbeData, name: str, seed: int) -> float:
    """The test accuracy of a linear classifier on the features of one encoder."""
    return linear_fit(data, name, seed).accuracy


def linear_fit(data: ProbeData, name: str, seed: int) -> LinearAccuracy:
    """Choose the regularisation, fit, and judge on the test images, for the features of one encoder."""
    train, labels = data.train[name].numpy(), data.train_labels.numpy()
    strength = choose_strength(train, labels, seed)
    classifier = fit(train, labels, strength)
    accuracy = float(classifier.score(data.test[name].numpy(), data.test_labels.numpy()))
    return LinearAccuracy(accuracy, standard_error(accuracy, len(data.test_labels)), strength)


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


def fit(features: np.ndarray | Tensor, labels: np.ndarray, strength: float) -> "Pipeline":
    """Standardised features and a multinomial logistic regression."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterations change no figure
        return classifier.fit(features, labels)
