"""What images a run reads, how they reach the model, and what is done to them on the way."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator

from quarterview.config import FIRST, MAY_CHANGE, PATH, RESEARCH, Ge, Gt, Le, Text, Texts, part

CacheKind = Literal["auto", "device", "none"]
CropKind = Literal["random", "fixed", "none"]
ShuffleKind = Literal["auto", "full", "shards"]

CROP_SCALE = (0.2, 1.0)
"""Smallest and largest share of the area that a random crop of pre-training keeps."""
FINETUNING_CROP_MIN = 0.08
RANDAUGMENT = "rand-m9-mstd0.5-inc1"
"""The paper's RandAugment (9, 0.5) in timm's words, which are not torchvision's."""


def _or_none(value: object) -> object:
    return None if value == "none" else value


@part
class DataConfig:
    """Images."""

    data: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: folders, packed stores, tar shards (also by URL), .txt lists of paths, parquet, .npy/.npz
    arrays, torchvision:NAME, or shapes. May be repeated."""
    holdout: Annotated[int | None, Ge(0)] = None
    """Images never trained on, for val_loss and the panel; by default 1%, at most 512."""
    shuffle: ShuffleKind = "auto"
    """Mix all images of the set (full), or a few shards at a time, so that each is read once an epoch
    (shards: tar, parquet, packed stores). auto is shards for remote data, else full."""
    shuffle_shards: Annotated[int, Ge(1)] = 16
    """How many shards are mixed at a time by --shuffle shards; of parquet, row groups."""
    shard_cache_gib: Annotated[float, Ge(0), MAY_CHANGE] = 0.0
    """GiB of remote shards to keep on the local disk; 0 keeps none and reads each part where it is."""
    shard_cache_dir: Annotated[Text, PATH, MAY_CHANGE] = ""
    """Where they are kept; by default in ~/.cache/quarterview."""


@part
class LoaderConfig:
    """Loading."""

    cache: CacheKind = "auto"
    """Hold the whole set on the device (device), stream it through workers (none), or decide: 8-bit sets of
    one image size under 2 GiB are held (auto)."""
    workers: Annotated[int | None, Ge(0), MAY_CHANGE] = None
    """Processes that decode images; by default one a core, eight at most. 0 decodes in the main process."""
    max_bad_samples: Annotated[float, Ge(0), Le(1), MAY_CHANGE] = 0.01
    """Share of broken images above which the run stops. Broken images are replaced and recorded."""

    @property
    def threads(self) -> int:
        """How many images are decoded at a time."""
        return min(8, os.cpu_count() or 1) if self.workers is None else self.workers


@dataclass(frozen=True)
class ColorDistortion:
    """How the colors of a view are distorted. Probabilities are those of an image to be changed."""

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """How far brightness, contrast and saturation may go from 1, and the hue from where it is, in turns."""
    jitter_prob: float = 0.8
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    solarize_prob: float = 0.0


SIMCLR_COLORS = (ColorDistortion((0.8, 0.8, 0.8, 0.2), gray_prob=0.2),) * 2
"""Chen et al. 2020, appendix A, at full strength, for both views; small images are not blurred there, nor
here."""
BYOL_COLORS = (
    ColorDistortion((0.4, 0.4, 0.2, 0.1), gray_prob=0.2, blur_prob=1.0),
    ColorDistortion((0.4, 0.4, 0.2, 0.1), gray_prob=0.2, blur_prob=0.1, solarize_prob=0.2),
)
"""Grill et al. 2020, table 6: of the first view and of the second. MoCo v3 has the same."""


@dataclass(frozen=True)
class View:
    """How one view of an image is made."""

    crop: CropKind = "random"
    """A box of random size, shape and place; one of fixed size, seven eighths of the largest; or the central
    one, without a flip."""
    crop_min: float = CROP_SCALE[0]
    flip: bool = True
    colors: ColorDistortion | None = None


@part
class ViewConfig:
    """Crops and colors."""

    crop: CropKind = "random"
    """Train on boxes of random size and place, on boxes of one size at random places (fixed, seven eighths of
    the largest), or on the central box without flips (none)."""
    crop_min: Annotated[float, Gt(0), Le(1)] = CROP_SCALE[0]
    """The smallest share of the image's area that a random crop keeps."""
    color_jitter: Annotated[float, Ge(0), Le(2), RESEARCH] = 0.0
    """Change brightness, contrast and saturation of each image by up to this share, and its hue by a quarter
    of it (table 1e: harms). Of images with one channel or many, brightness and contrast alone."""

    @property
    def view(self) -> View:
        """How the one view of a masked autoencoder is made."""
        j = self.color_jitter
        return View(
            self.crop, self.crop_min, colors=ColorDistortion((j, j, j, j / 4), jitter_prob=1.0) if j else None
        )


@part
class AugmentConfig:
    """Augmentation. The defaults are the official fine-tuning's."""

    crop_min: Annotated[float, Gt(0), Le(1)] = FINETUNING_CROP_MIN
    """The smallest share of the image's area that a random crop keeps."""
    flip: bool = True
    """Mirror half of the images."""
    randaugment: Annotated[Text | None, BeforeValidator(_or_none)] = RANDAUGMENT
    """A policy of timm's RandAugment, or none. Needs 8-bit RGB images and the extra quarterview[timm]."""
    erase: Annotated[float, Ge(0), Le(1)] = 0.25
    """Probability that a rectangle of an image is replaced by noise."""
