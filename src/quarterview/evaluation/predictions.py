"""What a classifier that is being fine-tuned predicts for the test images, and its accuracy."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quarterview.data.sources.base import Source
from quarterview.errors import RunError
from quarterview.evaluation.features import class_scores, extract
from quarterview.models.classifier import Classifier
from quarterview.training.trainer import Trainer

_PREDICTIONS = "predictions.npz"


class Predictions(NamedTuple):
    """What a classifier predicted for the test images."""

    images: np.ndarray
    """int64 [M], the ids of those that could be read, in order."""
    classes: np.ndarray
    """int64 [M], the predicted class of each."""


def read_predictions(run: Path) -> Predictions | None:
    """What the last evaluation of a fine-tuning run predicted; None if it wrote nothing."""
    file = run / "results" / _PREDICTIONS
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as stored:
        return Predictions(stored["images"], stored["classes"])


def correct_predictions(run: Path, labels: Tensor) -> np.ndarray:
    """Which of the readable test images a complete run predicts right: bool [M].

    Args:
        labels: int64, of all test images.

    Raises:
        RunError: if its predictions are missing.
    """
    found = read_predictions(run)
    if found is None:
        raise RunError(f"{run / 'results' / _PREDICTIONS} is missing; remove {run} to train it again")
    return np.equal(found.classes, labels[torch.from_numpy(found.images)].numpy())


def _write_predictions(run: Path, found: Predictions) -> None:
    """Keep them, whole or not at all."""
    folder = run / "results"
    folder.mkdir(exist_ok=True)
    partial = folder / f".{_PREDICTIONS}.partial.npz"
    np.savez(partial, images=found.images, classes=found.classes)
    partial.replace(folder / _PREDICTIONS)


class TestAccuracy:
    """The accuracy on the test images, as columns for the metrics; the predictions are kept.

    With a moving average of the weights `test_accuracy` is the average's, and that of the weights
    themselves stands beside it.
    """

    __test__ = False  # not a test of pytest's

    def __init__(
        self,
        trainer: Trainer,
        model: Classifier,
        source: Source,
        labels: Tensor,
        crop_pct: float | None = None,
    ) -> None:
        self.trainer, self.model, self.source, self.labels = trainer, model, source, labels
        self.crop_pct = crop_pct

    def __call__(self, step: int) -> dict[str, float]:
        trainer = self.trainer
        judged = {"test_accuracy": class_scores(self.model, trainer.watched_ema or None)}
        if trainer.ema:
            judged["test_accuracy_last"] = class_scores(self.model)
        scores, seen = extract(
            judged,
            self.source,
            range(len(self.source)),
            self.model.config,
            trainer.world.device,
            crop_pct=self.crop_pct,
            precision=trainer.precision,
        )
        if len(seen) < len(self.source):
            trainer.log.warn(f"{len(self.source) - len(seen)} test image(s) could not be read")
        truth = self.labels[seen]
        predicted = scores["test_accuracy"].argmax(dim=1).numpy()
        _write_predictions(trainer.folder, Predictions(np.array(seen, np.int64), predicted))
        right = {name: float((s.argmax(dim=1) == truth).double().mean()) for name, s in scores.items()}
        return {**right, "test_images": len(seen)}
