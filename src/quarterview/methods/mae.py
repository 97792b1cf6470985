"""Masked autoencoding: He et al. 2021."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.methods.base import Loss, Setting
from quarterview.methods.config import MAE, BEiT, autoencoder_config
from quarterview.models.create import fresh_model
from quarterview.models.mae import MaskedAutoencoder


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


def build(config: MAE | BEiT, setting: Setting) -> MaskedAutoencoding:
    """Masked autoencoding, or BEiT, which is its case of visual tokens and no decoder."""
    model = fresh_model(autoencoder_config(config, setting.encoder, setting.vocabulary), setting.seed)
    return MaskedAutoencoding(model, setting.seed, config.masks_per_image, config.uniformity, setting.gather)
