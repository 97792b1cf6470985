"""Supervised classification, with the regularisation of the paper's fine-tuning (table 9)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.data.transforms.mixing import mix
from quarterview.errors import UserError, check_types
from quarterview.methods.base import Loss
from quarterview.models.classifier import Classifier, drop_path_scales


@dataclass(frozen=True)
class SupervisedConfig:
    """How a classifier is kept from learning its training images by heart."""

    smoothing: float = 0.1
    """Label smoothing: this share of the target is spread over all classes."""
    mixup: float = 0.8
    """Alpha of mixup; 0 is off."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 is off. Where both are on, each pair of images draws one of them."""
    drop_path: float = 0.1
    """Rate of stochastic depth at the last block; it grows linearly from 0 at the first."""

    def __post_init__(self) -> None:
        check_types(self, SupervisedConfig)
        for name in ("smoothing", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}; accepted: 0 to below 1")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}; accepted: 0 or more")


class Supervised(nn.Module):
    """Cross-entropy against the labels of a batch, in evaluation mode without any regularisation.

    Raises:
        ValueError: if a batch has no labels, or an odd number of images where they are mixed.
    """

    def __init__(self, model: Classifier, config: SupervisedConfig, seed: int) -> None:
        super().__init__()
        self.model, self.config, self.seed = model, config, seed

    def forward(self, batch: Batch) -> Loss:
        if batch.labels is None:
            raise ValueError("a batch without labels; accepted: batches of a loader that was given labels")
        if not self.training:
            return Loss(F.cross_entropy(self.model(batch.images), batch.labels), {})
        images, targets = batch.images, self._targets(batch.labels)
        if self.config.mixup or self.config.cutmix:
            if len(images) % 2:
                raise ValueError(f"{len(images)} images cannot be mixed in pairs; accepted: even batches")
            images, targets = mix(
                images, targets, batch.epochs, batch.ids, self.seed, self.config.mixup, self.config.cutmix
            )
        logits = self.model(images, self._scales(batch))
        return Loss(F.cross_entropy(logits, targets), {})

    def _targets(self, labels: Tensor) -> Tensor:
        """float [B, classes]: one-hot, smoothed."""
        classes = self.model.config.classes
        one_hot = F.one_hot(labels, classes).float()
        return one_hot * (1 - self.config.smoothing) + self.config.smoothing / classes

    def _scales(self, batch: Batch) -> Tensor | None:
        if not self.config.drop_path:
            return None
        depth = len(self.model.blocks)
        uniforms = rng.uniform(self.seed, "drop path", batch.epochs, batch.ids, 2 * depth)
        return drop_path_scales(uniforms.view(-1, depth, 2), self.config.drop_path)
