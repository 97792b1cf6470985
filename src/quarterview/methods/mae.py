"""Masked autoencoding: He et al. 2021."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.errors import UserError, check_types
from quarterview.methods.base import Loss
from quarterview.models.mae import MaskedAutoencoder


@dataclass(frozen=True)
class MaskingConfig:
    """How often an image is hidden."""

    masks_per_image: int = 1
    """Ways in which each image is hidden in the same update, so that it is read and augmented once for all.
    The model's work and memory grow as many times; the batch size, in images, and the learning rate stay."""
    uniformity: float = 0.0
    """How much it costs that features of different images point the same way: times the mean squared cosine
    between those of a batch (U-MAE, Zhang et al. 2022, who take 0.01). 0 is off."""

    def __post_init__(self) -> None:
        check_types(self, MaskingConfig)
        if self.masks_per_image < 1:
            raise UserError(f"{self.masks_per_image} masks per image; accepted: 1 or more")
        if not 0 <= self.uniformity <= 1000:
            raise UserError(f"a uniformity of {self.uniformity}; accepted: 0 to 1000")


class MaskedAutoencoding(nn.Module):
    """Hide patches, keyed by (seed, epoch, sample, mask), and predict them.

    The loss is the mean over all masks of all images. In evaluation mode each image has its first
    mask alone, and the loss is that of the predictions.

    Args:
        uniformity: weight of `likeness` between the images of the whole batch, by their first masks.
        gather: brings the rows of all ranks together, with their gradients.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        seed: int,
        masks_per_image: int = 1,
        uniformity: float = 0.0,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.masks_per_image = masks_per_image
        self.uniformity, self.gather = uniformity, gather

    def forward(self, batch: Batch) -> Loss:
        masks = self.masks_per_image if self.training else 1
        out = self.model(batch.images, noise=self.noise(batch.epochs, batch.ids, masks))
        if not self.uniformity or not self.training:
            return Loss(out.loss, {})
        cls = self.model.config.cls_tokens
        features = out.latent[::masks, cls : cls + self.model.kept].float().mean(dim=1)  # [B, D]
        with torch.autocast(batch.images.device.type, enabled=False):
            alike = likeness(self.gather(features))
        return Loss(out.loss + self.uniformity * alike, {"prediction": out.loss, "likeness": alike})

    def noise(self, epochs: Tensor, ids: Tensor, masks: int = 1) -> Tensor:
        """What decides which patches of each sample are hidden: float [B, masks, L].

        The first masks do not depend on how many there are.
        """
        needed = self.model.uniforms_needed
        uniforms = rng.uniform(self.seed, "mask", epochs, ids, masks * needed)  # [B, masks * needed]
        return self.model.mask_noise(uniforms.view(-1, needed)).unflatten(0, (-1, masks))


def likeness(features: Tensor) -> Tensor:
    """The mean squared cosine between features float [B, D] of different images; 1 if all are alike."""
    unit = F.normalize(features, dim=1)
    squares = (unit @ unit.T).square()
    others = len(unit) * (len(unit) - 1)
    return (squares.sum() - squares.diagonal().sum()) / others
