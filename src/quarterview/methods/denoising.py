"""Denoising (Vincent et al. 2008): every patch is seen, through noise, and the clean picture is predicted.

The same model, target and loss as masked autoencoding, without masks: what masking adds is seen
beside it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.errors import UserError, check_types
from quarterview.methods.base import Loss
from quarterview.models.mae import MaskedAutoencoder


@dataclass(frozen=True)
class NoiseConfig:
    """How noisy the pictures are."""

    noise: float = 1.0
    """Of --objective denoising: the noise's deviation, in deviations of the pixels. At 1 half of what the
    encoder sees is noise."""

    def __post_init__(self) -> None:
        check_types(self, NoiseConfig)
        if not 0 < self.noise <= 100:
            raise UserError(f"noise of deviation {self.noise}; accepted: above 0, up to 100")


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
