"""How well a classifier does on corrupted pictures and on other sets (He et al. 2021, table 13)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from quarterview.data.config import LoaderConfig
from quarterview.data.sources.base import Source
from quarterview.errors import UserError
from quarterview.evaluation.config import COMMON, RobustnessConfig
from quarterview.evaluation.corruptions import Corruption, all_of, predictions
from quarterview.evaluation.features import class_scores, extract
from quarterview.evaluation.statistics import figures
from quarterview.models.classifier import Classifier

ALEXNET: Mapping[str, float] = {
    **{"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640},
    **{"defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360},
    **{"snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592},
    **{"contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840},
    "jpeg_compression": 0.606500,
}
"""AlexNet's mean errors on ImageNet-C, by which the mCE divides (Hendrycks and Dietterich 2019)."""
Accuracies = Mapping[str, Mapping[int, float]]
"""By corruption and severity."""


@dataclass(frozen=True)
class Corrupted:
    """How a classifier does on a set that is corrupted."""

    images: int
    """That could be read."""
    unreadable: int
    classes: int
    """That the set has."""
    clean: float
    """Accuracy without corruption."""
    accuracies: Accuracies
    severities: tuple[int, ...]

    @property
    def mean_error(self) -> float | None:
        """Over the severities, and those of the 15 common corruptions that were judged; None for none."""
        errors = [1 - fmean(by.values()) for name, by in self.accuracies.items() if name in COMMON]
        return fmean(errors) if errors else None

    @property
    def corruption_errors(self) -> dict[str, float]:
        """Each common corruption's error as a share of AlexNet's, over all severities."""
        return {n: (1 - fmean(by.values())) / ALEXNET[n] for n, by in self.accuracies.items() if n in ALEXNET}

    @property
    def mce(self) -> float:
        """The mean corruption error of Hendrycks and Dietterich 2019, as a share: 1 is AlexNet."""
        return fmean(self.corruption_errors.values())


@dataclass(frozen=True)
class SetAccuracy:
    """How a classifier does on another set."""

    images: int
    """That could be read."""
    unreadable: int
    classes: int
    """That the set has, and between which the classifier chose."""
    accuracy: float
    standard_error: float


def corrupted_accuracy(
    model: Classifier,
    source: Source,
    truth: Tensor,
    config: RobustnessConfig,
    progress: Callable[[int], None] | None = None,
) -> Corrupted:
    """The accuracy on images under every corruption at every severity, and under none.

    Args:
        model: on its device.
        truth: int64 [N], of `classes_of`.
        progress: told how many images are done.

    Raises:
        UserError: if the images are no 8-bit RGB, or none can be read.
    """
    severities = tuple(sorted(set(config.severities)))
    conditions = [Corruption(name, severity) for name in config.names for severity in severities]
    right = torch.zeros(1 + len(conditions), dtype=torch.int64)
    seen = 0
    for images, predicted in predictions(
        model,
        source,
        partial(all_of, (None, *conditions)),
        config.seed,
        config.crop_pct,
        config.precision,
        LoaderConfig(workers=config.workers).threads,
        config.batch_size,
    ):
        right += (predicted == truth[images][:, None]).sum(dim=0)
        seen += len(images)
        if progress is not None:
            progress(images[-1] + 1)
    if not seen:
        raise UserError("none of the images of --test can be read. Give images that can.")
    clean, *shares = (right.double() / seen).tolist()
    accuracies: dict[str, dict[int, float]] = {}
    for what, share in zip(conditions, shares, strict=True):
        accuracies.setdefault(what.name, {})[what.severity] = share
    return Corrupted(seen, len(source) - seen, len(truth.unique()), clean, accuracies, severities)


def set_accuracy(model: Classifier, source: Source, truth: Tensor, config: RobustnessConfig) -> SetAccuracy:
    """The accuracy on a set, of a classifier that chooses between the classes that the set has.

    So are ImageNet-A and ImageNet-R judged, which have 200 of ImageNet's classes.

    Args:
        model: on its device.
        truth: int64 [N], of `classes_of`, two classes or more.
    """
    present = truth.unique()
    device = next(model.parameters()).device
    scores, seen = extract(
        {"": class_scores(model)},
        source,
        range(len(source)),
        model.config,
        device,
        config.batch_size,
        config.crop_pct,
        config.precision,
    )
    predicted = present[scores[""][:, present].argmax(dim=1)]
    judged = dict(figures(predicted == truth[seen]))
    return SetAccuracy(len(seen), len(source) - len(seen), len(present), **judged)
