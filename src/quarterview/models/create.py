"""Make a masked autoencoder with fresh weights."""

from quarterview import rng
from quarterview.errors import unknown
from quarterview.models.config import MAEConfig
from quarterview.models.mae import MaskedAutoencoder


def fresh_model(config: MAEConfig, seed: int) -> MaskedAutoencoder:
    """A model with the initial weights that belong to a seed."""
    with rng.seeded(seed, "init"):
        return MaskedAutoencoder(config)


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
