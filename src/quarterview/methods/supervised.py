"""Supervised classification, with the regularisation of the paper's fine-tuning (table 9)."""

import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.data.transforms.mixing import mix
from quarterview.methods import config as configs
from quarterview.methods.base import Loss, Setting
from quarterview.methods.config import RegularizationConfig
from quarterview.models.classifier import Classifier
from quarterview.models.config import ClassifierConfig, ViTConfig
from quarterview.models.create import fresh_classifier
from quarterview.models.vit import drop_path_scales


class Supervised(nn.Module):
    """Cross-entropy against the labels of a batch, in evaluation mode without any regularisation.

    Raises:
        ValueError: if a batch has no labels, or an odd number of images where they are mixed.
    """

    def __init__(self, model: Classifier, config: RegularizationConfig, seed: int) -> None:
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


def build(config: configs.Supervised, setting: Setting) -> Supervised:
    """Classification of the classes that the images have."""
    encoder = {name: getattr(setting.encoder, name) for name in ViTConfig.__dataclass_fields__}
    model = ClassifierConfig(**encoder, classes=setting.classes, class_names=setting.class_names)
    return Supervised(fresh_classifier(model, setting.seed), config, setting.seed)
