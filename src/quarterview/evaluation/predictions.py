"""Test predictions and test accuracy of a classifier during fine-tuning."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quarterview.data.sources.base import Source
from quarterview.errors import RunError
from quarterview.evaluation.features import extract_features, make_logits_fn
from quarterview.models.classifier import Classifier
from quarterview.training.trainer import Trainer

_FILE_NAME = "predictions.npz"


class Predictions(NamedTuple):
    """The predictions of a classifier for the readable test images."""

    image_ids: np.ndarray
    """int64 [M], the ids of the readable images, in order."""
    class_indices: np.ndarray
    """int64 [M], the predicted class of each."""


def read_predictions(run: Path) -> Predictions | None:
    """Read the predictions of the last evaluation of a fine-tuning run; None if there are none."""
    file = run / "results" / _FILE_NAME
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as stored:
        return Predictions(stored["images"], stored["classes"])


def read_correct_predictions(run: Path, labels: Tensor) -> np.ndarray:
    """Read which of the readable test images a complete run classifies correctly: bool [M].

    Args:
        labels: int64, the labels of all test images.

    Raises:
        RunError: if the predictions of the run are missing.
    """
    predictions = read_predictions(run)
    if predictions is None:
        raise RunError(f"{run / 'results' / _FILE_NAME} is missing. Remove {run} to train it again.")
    return np.equal(predictions.class_indices, labels[torch.from_numpy(predictions.image_ids)].numpy())


def _write_predictions(run: Path, predictions: Predictions) -> None:
    """Write the predictions of a run atomically."""
    folder = run / "results"
    folder.mkdir(exist_ok=True)
    partial = folder / f".{_FILE_NAME}.partial.npz"
    np.savez(partial, images=predictions.image_ids, classes=predictions.class_indices)
    partial.replace(folder / _FILE_NAME)


class TestAccuracy:
    """Evaluator that returns the test accuracy as columns of the metrics, and writes the predictions.

    With a moving average of the weights, `test_accuracy` is the accuracy of the average, and
    `test_accuracy_last` that of the current weights.
    """

    __test__ = False  # pytest would collect the class by its name

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
        models = {"test_accuracy": make_logits_fn(self.model, trainer.eval_ema or None)}
        if trainer.ema:
            models["test_accuracy_last"] = make_logits_fn(self.model)
        logits, read_ids = extract_features(
            models,
            self.source,
            range(len(self.source)),
            self.model.config,
            trainer.world.device,
            crop_pct=self.crop_pct,
            precision=trainer.precision,
        )
        if len(read_ids) < len(self.source):
            trainer.log.warning(
                f"{len(self.source) - len(read_ids)} test image(s) could not be read. They are left out."
            )
        labels = self.labels[read_ids]
        predicted = logits["test_accuracy"].argmax(dim=1).numpy()
        _write_predictions(trainer.folder, Predictions(np.array(read_ids, np.int64), predicted))
        accuracies = {n: float((x.argmax(dim=1) == labels).double().mean()) for n, x in logits.items()}
        return {**accuracies, "test_images": len(read_ids)}
