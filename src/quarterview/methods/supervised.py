"""Supervised classification with the regularisation of the paper's fine-tuning (table 9)."""

import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.data.transforms.mixing import mix_pairs
from quarterview.methods import config as configs
from quarterview.methods.base import MethodContext, MethodOutput
from quarterview.methods.config import RegularizationConfig
from quarterview.models.classifier import Classifier
from quarterview.models.config import ClassifierConfig, ViTConfig
from quarterview.models.create import create_classifier
from quarterview.models.vit import compute_drop_path_scales


class Supervised(nn.Module):
    """Cross-entropy with label smoothing, mixup, CutMix and drop path, all of them in training mode only.

    Raises:
        ValueError: if a batch has no labels, or with mixup or CutMix an odd number of images.
    """

    def __init__(self, model: Classifier, config: RegularizationConfig, seed: int) -> None:
        super().__init__()
        self.model, self.config, self.seed = model, config, seed

    def forward(self, batch: Batch) -> MethodOutput:
        if batch.labels is None:
            raise ValueError("The batch has no labels. Use a loader with labels.")
        if not self.training:
            return MethodOutput(F.cross_entropy(self.model(batch.images), batch.labels), {})
        images, targets = batch.images, self._make_targets(batch.labels)
        if self.config.mixup or self.config.cutmix:
            if len(images) % 2:
                raise ValueError(f"Mixup needs an even batch, and this one has {len(images)} images.")
            images, targets = mix_pairs(
                images, targets, batch.epochs, batch.ids, self.seed, self.config.mixup, self.config.cutmix
            )
        logits = self.model(images, self._draw_drop_path_scales(batch))
        return MethodOutput(F.cross_entropy(logits, targets), {})

    def _make_targets(self, labels: Tensor) -> Tensor:
        """Return one-hot targets with label smoothing, float [B, classes]."""
        classes = self.model.config.classes
        one_hot = F.one_hot(labels, classes).float()
        return one_hot * (1 - self.config.smoothing) + self.config.smoothing / classes

    def _draw_drop_path_scales(self, batch: Batch) -> Tensor | None:
        if not self.config.drop_path:
            return None
        depth = len(self.model.blocks)
        uniforms = rng.uniform(self.seed, "drop path", batch.epochs, batch.ids, 2 * depth)
        return compute_drop_path_scales(uniforms.view(-1, depth, 2), self.config.drop_path)


def build(config: configs.SupervisedConfig, context: MethodContext) -> Supervised:
    """Build supervised classification for the classes of the images."""
    encoder = {name: getattr(context.encoder, name) for name in ViTConfig.__dataclass_fields__}
    model = ClassifierConfig(**encoder, classes=context.num_classes, class_names=context.class_names)
    return Supervised(create_classifier(model, context.seed), config, context.seed)
