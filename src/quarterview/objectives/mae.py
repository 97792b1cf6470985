"""Masked autoencoding: He et al. 2021."""

from dataclasses import dataclass

from torch import Tensor, nn

from quarterview import draws
from quarterview.data.loader import Batch
from quarterview.errors import UserError, check_types
from quarterview.model.mae import MaskedAutoencoder
from quarterview.objectives.objective import Loss


@dataclass(frozen=True)
class MaskingConfig:
    """How often an image is hidden."""

    masks_per_image: int = 1
    """Ways in which each image is hidden in the same update, so that it is read and augmented once for all.
    The model's work and memory grow as many times; the batch size, in images, and the learning rate stay."""

    def __post_init__(self) -> None:
        check_types(self, MaskingConfig)
        if self.masks_per_image < 1:
            raise UserError(f"{self.masks_per_image} masks per image; accepted: 1 or more")


class MaskedAutoencoding(nn.Module):
    """Hide patches, keyed by (seed, epoch, sample, mask), and predict them.

    The loss is the mean over all masks of all images. In evaluation mode each image has its first
    mask alone.
    """

    def __init__(self, model: MaskedAutoencoder, seed: int, masks_per_image: int = 1) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.masks_per_image = masks_per_image

    def forward(self, batch: Batch) -> Loss:
        masks = self.masks_per_image if self.training else 1
        out = self.model(batch.images, noise=self.noise(batch.epochs, batch.ids, masks))
        return Loss(out.loss, {})

    def noise(self, epochs: Tensor, ids: Tensor, masks: int = 1) -> Tensor:
        """What decides which patches of each sample are hidden: float [B, masks, L].

        The first masks do not depend on how many there are.
        """
        needed = self.model.uniforms_needed
        uniforms = draws.uniform(self.seed, "mask", epochs, ids, masks * needed)  # [B, masks * needed]
        return self.model.mask_noise(uniforms.view(-1, needed)).unflatten(0, (-1, masks))
