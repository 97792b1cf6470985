"""A training step on images that are at hand, for benchmarks."""

from collections.abc import Callable

import torch

from quarterview.data.loader import Batch
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.models.config import MAEConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.training.distributed import World
from quarterview.training.optim import adamw
from quarterview.training.step import Step
from quarterview.training.trainer import precision_context


def noise_batch(config: MAEConfig, size: int, device: torch.device) -> Batch:
    """A batch of noise: a step takes as long as on pictures."""
    images = torch.randn(size, config.in_chans, *config.image_size, device=device)
    ids = torch.arange(size, device=device)
    return Batch(images, ids, torch.zeros_like(ids))


def update_of(
    model: MaskedAutoencoder, batch: int, precision: str, device: torch.device
) -> Callable[[], None]:
    """Forward, backward and optimiser, as the loop of a run goes through them."""
    objective = MaskedAutoencoding(model.to(device), seed=0)
    step = Step(objective, adamw(objective, 0.05), World(device), precision_context(precision, device))
    data = noise_batch(model.config, batch, device)

    def update() -> None:
        step.apply(step.gradients(data)[0])

    return update
