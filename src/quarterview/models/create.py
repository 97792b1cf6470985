"""Create models with initial weights."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from quarterview import rng
from quarterview.config import get_field_specs, get_renamed_fields, use_new_names
from quarterview.errors import unknown
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.config import MAEConfig, ViTConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.tokenizer import DiscreteVAE, TokenizerConfig
from quarterview.models.vit import VisionTransformer

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


def create_with_seed(model_class: Callable[[Config], Model], config: Config, seed: int) -> Model:
    """Create a model of the given class. The seed alone determines the initial weights."""
    with rng.seeded(seed, "init"):
        return model_class(config)


def create_mae(config: MAEConfig, seed: int) -> MaskedAutoencoder:
    """Create a masked autoencoder with the initial weights of a seed."""
    return create_with_seed(MaskedAutoencoder, config, seed)


def create_encoder(config: ViTConfig, seed: int) -> VisionTransformer:
    """Create an encoder with the initial weights of a seed."""
    return create_with_seed(VisionTransformer, config, seed)


def create_classifier(config: ClassifierConfig, seed: int) -> Classifier:
    """Create a classifier with the initial weights of a seed."""
    return create_with_seed(Classifier, config, seed)


def create_tokenizer(config: TokenizerConfig, seed: int) -> DiscreteVAE:
    """Create a tokenizer (discrete VAE) with the initial weights of a seed."""
    return create_with_seed(DiscreteVAE, config, seed)


def create_model(model: str, **config) -> MaskedAutoencoder:
    """Create a masked autoencoder with initial weights from torch's default generator.

    Args:
        model: ``mae_vit_{tiny,small,base,large,huge}_patch{N}``, see `parse_model_name`.
        config: any fields of `MAEConfig`.

    Raises:
        UserError: if the name of the model or of a field is unknown, or a value is invalid.
    """
    config = use_new_names(config, get_renamed_fields(MAEConfig))
    for name in config:
        if name not in get_field_specs(MAEConfig):
            raise unknown("model option", name, get_field_specs(MAEConfig))
    return MaskedAutoencoder(MAEConfig(model=model, **config))
