"""Describe how images are prepared for a model, in the format of each library."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from quarterview.models.config import ViTConfig

_PAPER_SIZE, _PAPER_CROP_PCT = (224, 224), 224 / 256
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Preprocessing:
    """Preparation of an image for a model: center crop, resize, scale to 0…1, normalise -> float [C, H, W].

    The field names are keys of the JSON that exports contain, so they must not change.
    """

    size: tuple[int, int]
    """Height and width in pixels."""
    channels: int
    """Number of channels."""
    mean: tuple[float, ...]
    """Mean of each channel, for pixels in 0…1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for pixels in 0…1."""
    recorded: bool
    """False if the model does not record mean and std. They are then 0 and 1, which change nothing."""
    crop_pct: float
    """Side of the center crop, as a fraction of the side of the largest centered box of the same shape."""
    interpolation: str = "bicubic"
    """Interpolation of the resizing, with antialiasing."""

    def to_json(self) -> str:
        """Return all fields as JSON, for formats without a preprocessing description of their own."""
        return json.dumps(asdict(self))


def get_preprocessing(config: ViTConfig, crop_pct: float | None = None) -> Preprocessing:
    """Return the preprocessing that a model expects.

    Args:
        config: the model's configuration.
        crop_pct: center-crop fraction that the model was evaluated with. By default 0.875 for 224 × 224
            pixels, as in the paper, and 1 for other sizes.
    """
    height, width = config.image_size
    if crop_pct is None:
        crop_pct = _PAPER_CROP_PCT if (height, width) == _PAPER_SIZE else 1.0
    channels = config.in_chans
    recorded = config.mean is not None and config.std is not None
    mean = config.mean if config.mean is not None else (0.0,) * channels
    std = config.std if config.std is not None else (1.0,) * channels
    return Preprocessing((height, width), channels, mean, std, recorded, crop_pct)


def to_timm_cfg(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the fields of timm's ``pretrained_cfg`` that ``timm.data.resolve_data_config`` reads."""
    return {
        "input_size": [preprocessing.channels, *preprocessing.size],
        "fixed_input_size": True,
        "interpolation": preprocessing.interpolation,
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": "center",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }


def to_transformers_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the content of ``preprocessor_config.json`` for transformers' ``ViTImageProcessor``.

    ``ViTImageProcessor`` cannot crop: it resizes the whole image to height × width.
    """
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": preprocessing.size[0], "width": preprocessing.size[1]},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
