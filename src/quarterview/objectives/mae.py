"""Masked autoencoding: He et al. 2021."""

from torch import nn

from quarterview import draws
from quarterview.data.loader import Batch
from quarterview.model.mae import MaskedAutoencoder
from quarterview.objectives.objective import Loss


class MaskedAutoencoding(nn.Module):
    """Hide patches, keyed by (seed, epoch, sample), and predict them."""

    def __init__(self, model: MaskedAutoencoder, seed: int) -> None:
        super().__init__()
        self.model = model
        self.seed = seed

    def forward(self, batch: Batch) -> Loss:
        uniforms = draws.uniform(self.seed, "mask", batch.epochs, batch.ids, self.model.uniforms_needed)
        out = self.model(batch.images, noise=self.model.mask_noise(uniforms))
        return Loss(out.loss, {})
