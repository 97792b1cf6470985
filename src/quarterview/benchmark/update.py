"""A training step on a fixed batch of random images, for benchmarks."""

from collections.abc import Callable

import torch

from quarterview.data.loader import Batch
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.models.config import MAEConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.training.distributed import World
from quarterview.training.optim import create_adamw
from quarterview.training.step import TrainStep
from quarterview.training.trainer import get_autocast_context


def make_noise_batch(config: MAEConfig, batch_size: int, device: torch.device) -> Batch:
    """Return a batch of random images; a training step takes as long as on real images."""
    images = torch.randn(batch_size, config.in_chans, *config.image_size, device=device)
    ids = torch.arange(batch_size, device=device)
    return Batch(images, ids, torch.zeros_like(ids))


def make_update(
    model: MaskedAutoencoder, batch_size: int, precision: str, device: torch.device
) -> Callable[[], None]:
    """Return a function that performs one training step: forward, backward and AdamW, as in a run."""
    objective = MaskedAutoencoding(model.to(device), seed=0)
    step = TrainStep(
        objective, create_adamw(objective, 0.05), World(device), get_autocast_context(precision, device)
    )
    data = make_noise_batch(model.config, batch_size, device)

    def update() -> None:
        step.update_weights(step.accumulate_gradients(data)[0])

    return update
