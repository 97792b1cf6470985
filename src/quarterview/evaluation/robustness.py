"""Robustness of a classifier on corrupted images and on other test sets (He et al. 2021, table 13)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from quarterview.data.config import LoaderConfig
from quarterview.data.sources.base import Source
from quarterview.errors import UserError
from quarterview.evaluation.config import COMMON_CORRUPTIONS, RobustnessConfig
from quarterview.evaluation.corruptions import Corruption, choose_all, predict_corrupted
from quarterview.evaluation.features import extract_features, make_logits_fn
from quarterview.evaluation.statistics import compute_accuracy_metrics
from quarterview.models.classifier import Classifier

ALEXNET_ERRORS: Mapping[str, float] = {
    **{"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640},
    **{"defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360},
    **{"snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592},
    **{"contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840},
    "jpeg_compression": 0.606500,
}
"""Mean errors of AlexNet on ImageNet-C, by which the mCE divides (Hendrycks and Dietterich 2019)."""
CorruptionAccuracies = Mapping[str, Mapping[int, float]]
"""Corruption -> severity -> accuracy."""


@dataclass(frozen=True)
class CorruptionResult:
    """The accuracies of a classifier on corrupted images. The field names are keys of result files."""

    images: int
    """Number of readable images."""
    unreadable: int
    """Number of unreadable images."""
    classes: int
    """Number of classes in the set."""
    clean: float
    """Accuracy without corruption."""
    accuracies: CorruptionAccuracies
    severities: tuple[int, ...]

    @property
    def mean_error(self) -> float | None:
        """The mean error over the severities of the evaluated common corruptions; None if there are none."""
        errors = [
            1 - fmean(row.values()) for name, row in self.accuracies.items() if name in COMMON_CORRUPTIONS
        ]
        return fmean(errors) if errors else None

    @property
    def corruption_errors(self) -> dict[str, float]:
        """Common corruption -> its mean error over the severities, divided by that of AlexNet."""
        return {
            n: (1 - fmean(row.values())) / ALEXNET_ERRORS[n]
            for n, row in self.accuracies.items()
            if n in ALEXNET_ERRORS
        }

    @property
    def mce(self) -> float:
        """The mean corruption error of Hendrycks and Dietterich 2019, as a ratio: 1 for AlexNet."""
        return fmean(self.corruption_errors.values())


@dataclass(frozen=True)
class SetAccuracy:
    """The accuracy of a classifier on another test set. The field names are keys of result files."""

    images: int
    """Number of readable images."""
    unreadable: int
    """Number of unreadable images."""
    classes: int
    """Number of classes in the set, to which the predictions are limited."""
    accuracy: float
    standard_error: float


def evaluate_corrupted(
    model: Classifier,
    source: Source,
    labels: Tensor,
    config: RobustnessConfig,
    progress: Callable[[int], None] | None = None,
) -> CorruptionResult:
    """Measure the accuracy on clean images and under every corruption at every severity.

    Args:
        model: the classifier, on its device.
        labels: int64 [N], class indices of the classifier, see `map_labels`.
        progress: called with the number of finished images.

    Raises:
        UserError: if the images are not 8-bit RGB, or none can be read.
    """
    severities = tuple(sorted(set(config.severities)))
    conditions = [Corruption(name, severity) for name in config.corruption_names for severity in severities]
    num_correct = torch.zeros(1 + len(conditions), dtype=torch.int64)
    num_images = 0
    for indices, predicted in predict_corrupted(
        model,
        source,
        partial(choose_all, (None, *conditions)),
        config.seed,
        config.crop_pct,
        config.precision,
        LoaderConfig(workers=config.workers).num_workers,
        config.batch_size,
    ):
        num_correct += (predicted == labels[indices][:, None]).sum(dim=0)
        num_images += len(indices)
        if progress is not None:
            progress(indices[-1] + 1)
    if not num_images:
        raise UserError("None of the images of --test can be read. Give images in a supported format.")
    clean, *corrupted = (num_correct.double() / num_images).tolist()
    accuracies: dict[str, dict[int, float]] = {}
    for condition, accuracy in zip(conditions, corrupted, strict=True):
        accuracies.setdefault(condition.name, {})[condition.severity] = accuracy
    num_unreadable, num_classes = len(source) - num_images, len(labels.unique())
    return CorruptionResult(num_images, num_unreadable, num_classes, clean, accuracies, severities)


def evaluate_set(model: Classifier, source: Source, labels: Tensor, config: RobustnessConfig) -> SetAccuracy:
    """Measure the accuracy on a set, with the predictions limited to the classes of the set.

    This is the protocol of ImageNet-A and ImageNet-R, which have 200 of the classes of ImageNet.

    Args:
        model: the classifier, on its device.
        labels: int64 [N], class indices of the classifier, see `map_labels`; at least two classes.
    """
    present = labels.unique()
    device = next(model.parameters()).device
    logits, read_ids = extract_features(
        {"": make_logits_fn(model)},
        source,
        range(len(source)),
        model.config,
        device,
        config.batch_size,
        config.crop_pct,
        config.precision,
    )
    predicted = present[logits[""][:, present].argmax(dim=1)]
    metrics = dict(compute_accuracy_metrics(predicted == labels[read_ids]))
    return SetAccuracy(len(read_ids), len(source) - len(read_ids), len(present), **metrics)
