"""Denoising (Vincent et al. 2008): every patch is seen, through noise, and the clean picture is predicted.

The same model, target and loss as masked autoencoding, without masks: what masking adds is seen
beside it.
"""

import math

import torch
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.methods import config as configs
from quarterview.methods.base import Loss, Setting
from quarterview.models.create import fresh_model
from quarterview.models.mae import MaskedAutoencoder


class Denoising(nn.Module):
    """Add Gaussian noise, keyed by (seed, epoch, sample), and predict all patches of the clean picture."""

    def __init__(self, model: MaskedAutoencoder, seed: int, deviation: float) -> None:
        super().__init__()
        self.model, self.seed, self.deviation = model, seed, deviation

    def forward(self, batch: Batch) -> Loss:
        noise = normal(self.seed, "noise", batch.epochs, batch.ids, batch.images[0].numel())
        noisy = batch.images + self.deviation * noise.view_as(batch.images)
        patches = self.model.patchify(noisy)
        seen = torch.arange(patches.shape[1], device=noisy.device).expand(len(noisy), -1)
        pred, _ = self.model.predict(patches, seen, seen[:, :0], seen)
        with torch.autocast(batch.images.device.type, enabled=False):
            truth = self.model.target(batch.images, self.model.patchify(batch.images), None)
            return Loss(self.model.target.loss(pred, truth).mean(), {})


def normal(seed: int, purpose: str, epochs: Tensor, ids: Tensor, count: int) -> Tensor:
    """Standard normal numbers for each sample, by the Box-Muller transform: float32 [B, count]."""
    half = (count + 1) // 2
    u = rng.uniform(seed, purpose, epochs, ids, 2 * half)
    radius, angle = (-2 * (1 - u[:, :half]).log()).sqrt(), 2 * math.pi * u[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def build(config: configs.Denoising, setting: Setting) -> Denoising:
    """Denoising with a masked autoencoder that hides nothing."""
    model = fresh_model(configs.autoencoder_config(config, setting.encoder), setting.seed)
    return Denoising(model, setting.seed, config.noise)
