"""Models of all types that exports must support, with weights far from their initial values."""

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.create import create_model
from quarterview.models.mae import MaskedAutoencoder

DECODER: dict[str, Any] = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
SMALL: dict[str, Any] = {
    "model": "mae_vit_32x2x2_patch8",
    "image_size": (16, 16),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny/4 at 32": {"model": "mae_vit_tiny_patch4", "image_size": 32},
    "base width/16 at 224": {"model": "mae_vit_768x2x12_patch16", "image_size": 224},
    "huge width/14 at 224": {"model": "mae_vit_1280x1x16_patch14", "image_size": 224},
    "96×160": {"model": "mae_vit_64x3x4_patch16", "image_size": (96, 160)},
    "one channel": {
        "model": "mae_vit_64x3x4_patch8",
        "image_size": 40,
        "in_chans": 1,
        "mean": (0.4,),
        "std": (0.2,),
    },
    "five channels": {
        "model": "mae_vit_64x3x4_patch4",
        "image_size": 32,
        "in_chans": 5,
        "mean": (0.1, 0.2, 0.3, 0.4, 0.5),
        "std": (0.5, 0.4, 0.3, 0.2, 0.1),
    },
}
EVERY_SIZE = [pytest.param(name, marks=pytest.mark.slow if "width" in name else ()) for name in SIZES]
CLASSES = ("cat", "dog", "naïve | ox")

ModelType = TypeVar("ModelType", MaskedAutoencoder, Classifier)


def autoencoder(**changes: Any) -> MaskedAutoencoder:
    """Return a masked autoencoder with the configuration `SMALL`, except for the arguments."""
    torch.manual_seed(0)
    return add_noise(create_model(**{**SMALL, **DECODER, **changes}))


def classifier(**changes: Any) -> Classifier:
    """Return a classifier of `CLASSES` with the configuration `SMALL`, except for the arguments."""
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(**{**SMALL, "classes": 3, "class_names": CLASSES, **changes}))
    nn.init.normal_(model.head.weight, std=0.2)  # the initial 2e-5 would hide differences of the encoder
    return add_noise(model)


@torch.no_grad()
def add_noise(model: ModelType) -> ModelType:
    """Add noise to biases, norms and tokens, which are initialised with constants or small values."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim != 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def random_images(model: MaskedAutoencoder | Classifier, batch_size: int = 2) -> Tensor:
    """Return standard normal images of a model's size, [batch_size, C, H, W]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, model.config.in_chans, *model.config.image_size, generator=generator)
