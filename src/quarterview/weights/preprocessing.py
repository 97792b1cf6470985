"""How a picture becomes the input of a model, said in each format's own way."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from quarterview.models.config import ViTConfig

_PAPER_SIZE, _PAPER_CROP_PCT = (224, 224), 224 / 256
_BICUBIC = 3  # Pillow's number for it


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to float [C, H, W]: crop centrally, resize, scale to 0…1, normalise."""

    size: tuple[int, int]
    """Height and width."""
    channels: int
    """How many there are."""
    mean: tuple[float, ...]
    """Channel means, of pixels in 0…1, that are taken away."""
    std: tuple[float, ...]
    """Channel deviations that the rest is divided by."""
    recorded: bool
    """Whether the model says its mean and std; if it does not they are 0 and 1, which change nothing."""
    crop_pct: float
    """Share of the sides of the largest central box that is looked at."""
    interpolation: str = "bicubic"
    """With antialiasing."""

    def as_json(self) -> str:
        """For the formats that have no way of their own."""
        return json.dumps(asdict(self))


def preprocessing_of(config: ViTConfig, crop_pct: float | None = None) -> Preprocessing:
    """What a model wants.

    Args:
        config: of the model.
        crop_pct: that it was judged with; by default 0.875 for 224 × 224 pixels, as the paper's, and 1
            for other sizes.
    """
    height, width = config.image_size
    if crop_pct is None:
        crop_pct = _PAPER_CROP_PCT if (height, width) == _PAPER_SIZE else 1.0
    channels = config.in_chans
    recorded = config.mean is not None and config.std is not None
    mean = config.mean if config.mean is not None else (0.0,) * channels
    std = config.std if config.std is not None else (1.0,) * channels
    return Preprocessing((height, width), channels, mean, std, recorded, crop_pct)


def for_timm(wanted: Preprocessing) -> dict[str, Any]:
    """The fields of timm's ``pretrained_cfg``, which ``timm.data.resolve_data_config`` reads."""
    return {
        "input_size": [wanted.channels, *wanted.size],
        "fixed_input_size": True,
        "interpolation": wanted.interpolation,
        "crop_pct": wanted.crop_pct,
        "crop_mode": "center",
        "mean": list(wanted.mean),
        "std": list(wanted.std),
    }


def for_transformers(wanted: Preprocessing) -> dict[str, Any]:
    """The content of ``preprocessor_config.json``.

    ``ViTImageProcessor`` cannot crop: it resizes the whole picture to height × width.
    """
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": wanted.size[0], "width": wanted.size[1]},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(wanted.mean),
        "image_std": list(wanted.std),
    }
