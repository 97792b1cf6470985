"""Denoising autoencoding (Vincent et al. 2008): predict the clean image from a noisy one, without masks.

Model, target and loss are those of masked autoencoding, so a comparison of the two shows what masking adds.
"""

import math

import torch
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.methods import config as configs
from quarterview.methods.base import MethodContext, MethodOutput
from quarterview.models.create import create_mae
from quarterview.models.mae import MaskedAutoencoder


class Denoising(nn.Module):
    """Add Gaussian noise to the images, and predict all patches of the clean images.

    The noise is a function of (seed, epoch, sample id).
    """

    def __init__(self, model: MaskedAutoencoder, seed: int, noise_std: float) -> None:
        super().__init__()
        self.model, self.seed, self.noise_std = model, seed, noise_std

    def forward(self, batch: Batch) -> MethodOutput:
        noise = draw_normal(self.seed, "noise", batch.epochs, batch.ids, batch.images[0].numel())
        noisy = batch.images + self.noise_std * noise.view_as(batch.images)
        patches = self.model.patchify(noisy)
        indices = torch.arange(patches.shape[1], device=noisy.device).expand(len(noisy), -1)
        pred, _ = self.model.predict(patches, indices, indices[:, :0], indices)  # all visible, none masked
        with torch.autocast(batch.images.device.type, enabled=False):
            truth = self.model.target(batch.images, self.model.patchify(batch.images), None)
            return MethodOutput(self.model.target.loss(pred, truth).mean(), {})


def draw_normal(seed: int, purpose: str, epochs: Tensor, ids: Tensor, count: int) -> Tensor:
    """Draw standard normal numbers for each sample by the Box-Muller transform: float32 [B, count]."""
    half = (count + 1) // 2
    u = rng.uniform(seed, purpose, epochs, ids, 2 * half)
    radius, angle = (-2 * (1 - u[:, :half]).log()).sqrt(), 2 * math.pi * u[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def build(config: configs.DenoisingConfig, context: MethodContext) -> Denoising:
    """Build denoising, with a masked autoencoder whose patches are all visible."""
    model = create_mae(configs.make_mae_config(config, context.encoder), context.seed)
    return Denoising(model, context.seed, config.noise_std)
