"""Make models with fresh weights."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from quarterview import rng
from quarterview.errors import unknown
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.config import MAEConfig, ViTConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.tokenizer import DiscreteVAE, TokenizerConfig
from quarterview.models.vit import VisionTransformer

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


def fresh(kind: Callable[[Config], Model], config: Config, seed: int) -> Model:
    """A model of a class, with the initial weights that belong to a seed."""
    with rng.seeded(seed, "init"):
        return kind(config)


def fresh_model(config: MAEConfig, seed: int) -> MaskedAutoencoder:
    """A masked autoencoder with the initial weights that belong to a seed."""
    return fresh(MaskedAutoencoder, config, seed)


def fresh_encoder(config: ViTConfig, seed: int) -> VisionTransformer:
    """An encoder with the initial weights that belong to a seed."""
    return fresh(VisionTransformer, config, seed)


def fresh_classifier(config: ClassifierConfig, seed: int) -> Classifier:
    """A classifier with the initial weights that belong to a seed."""
    return fresh(Classifier, config, seed)


def fresh_tokenizer(config: TokenizerConfig, seed: int) -> DiscreteVAE:
    """A tokenizer with the initial weights that belong to a seed."""
    return fresh(DiscreteVAE, config, seed)


def create_model(model: str, **config) -> MaskedAutoencoder:
    """A masked autoencoder with fresh weights, drawn from torch's default generator.

    Args:
        model: ``mae_vit_{tiny,small,base,large,huge}_patch{N}``, see `parse_model_name`.
        config: any field of `MAEConfig`.

    Raises:
        UserError: if the name, a field or a value is not accepted.
    """
    for name in config:
        if name not in MAEConfig.__dataclass_fields__:
            raise unknown("model option", name, MAEConfig.__dataclass_fields__)
    return MaskedAutoencoder(MAEConfig(model=model, **config))
