"""The pre-training method of the MAE paper (He et al. 2021): mask patches and predict them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.methods.base import MethodContext, MethodOutput
from quarterview.methods.config import BEiTConfig, MAEMethodConfig, make_mae_config
from quarterview.models.create import create_mae
from quarterview.models.mae import MaskedAutoencoder


class MaskedAutoencoding(nn.Module):
    """Mask patches and predict them. Masks are a function of (seed, epoch, sample id, number of the mask).

    The loss is the mean over all masks of all images. In evaluation mode each image has its first mask only,
    and the loss has no uniformity term.

    Args:
        model: the masked autoencoder.
        seed: the seed of the masks.
        masks_per_image: the number of masks of each image in a training step.
        uniformity: the weight of the uniformity loss (U-MAE), the mean squared cosine between the features of
            different images of the whole batch, computed with their first masks.
        gather: gathers the features of all ranks, with gradients.
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

    def forward(self, batch: Batch) -> MethodOutput:
        masks = self.masks_per_image if self.training else 1
        out = self.model(batch.images, noise=self.draw_mask_noise(batch.epochs, batch.ids, masks))
        if not self.uniformity or not self.training:
            return MethodOutput(out.loss, {})
        cls = self.model.config.cls_tokens
        features = out.latent[::masks, cls : cls + self.model.num_visible].float().mean(dim=1)  # [B, D]
        with torch.autocast(batch.images.device.type, enabled=False):
            similarity = compute_mean_squared_cosine(self.gather(features))
        metrics = {"prediction": out.loss, "likeness": similarity}
        return MethodOutput(out.loss + self.uniformity * similarity, metrics)

    def draw_mask_noise(self, epochs: Tensor, ids: Tensor, num_masks: int = 1) -> Tensor:
        """Draw the mask noise of each sample: float [B, num_masks, L].

        The first masks of a sample are the same whatever `num_masks` is.
        """
        needed = self.model.num_mask_uniforms  # per mask
        uniforms = rng.uniform(self.seed, "mask", epochs, ids, num_masks * needed)  # [B, masks * needed]
        return self.model.mask_noise(uniforms.view(-1, needed)).unflatten(0, (-1, num_masks))


def compute_mean_squared_cosine(features: Tensor) -> Tensor:
    """Return the mean squared cosine between the features [B, D] of different images, from 0 to 1."""
    unit = F.normalize(features, dim=1)
    squares = (unit @ unit.T).square()
    num_pairs = len(unit) * (len(unit) - 1)
    return (squares.sum() - squares.diagonal().sum()) / num_pairs


def build(config: MAEMethodConfig | BEiTConfig, context: MethodContext) -> MaskedAutoencoding:
    """Build masked autoencoding, or BEiT, which is masked autoencoding of visual tokens without a decoder."""
    model = create_mae(make_mae_config(config, context.encoder, context.codebook_size), context.seed)
    return MaskedAutoencoding(model, context.seed, config.masks_per_image, config.uniformity, context.gather)
