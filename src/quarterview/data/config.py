"""Configuration of a run's images: sources, loading, crops and augmentation."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from quarterview.config import FIRST, MAY_CHANGE, PATH, RESEARCH, Ge, Gt, Le, Text, Texts, part

CacheMode = Literal["auto", "device", "none"]
CropMode = Literal["random", "fixed", "none"]
ShuffleMode = Literal["auto", "full", "shards"]

CROP_SCALE = (0.2, 1.0)
"""Minimum and maximum area of a random crop in pre-training, as a fraction of the image area."""
FINETUNING_CROP_MIN = 0.08
"""Minimum area of a random crop in fine-tuning, as a fraction of the image area."""
RANDAUGMENT = "rand-m9-mstd0.5-inc1"
"""RandAugment (9, 0.5) of the MAE paper (table 9), as a policy string of timm."""


def _parse_none(value: object) -> object:
    return None if value == "none" else value


@part
class DataConfig:
    """Images."""

    data: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: folders, packed stores, tar shards (also by URL), .txt lists of paths, parquet, .npy/.npz
    arrays, torchvision:NAME, or shapes. May be repeated."""
    holdout: Annotated[int | None, Ge(0)] = None
    """Number of images never trained on, for val_loss and the panel. Default: 1%, at most 512."""
    shuffle: ShuffleMode = "auto"
    """full shuffles all images of the set. shards shuffles a few shards (tar, parquet, packed stores) at a
    time, so that each is read once per epoch. auto is shards for remote data, otherwise full."""
    shuffle_shards: Annotated[int, Ge(1)] = 16
    """Number of shards (for parquet: row groups) that --shuffle shards shuffles at a time."""
    shard_cache_gib: Annotated[float, Ge(0), MAY_CHANGE] = 0.0
    """GiB of remote shards to cache on the local disk. 0 caches none: every read goes to the remote."""
    shard_cache_dir: Annotated[Text, PATH, MAY_CHANGE] = ""
    """Folder of the cached remote shards. Default: ~/.cache/quarterview."""


@part
class LoaderConfig:
    """Loading."""

    cache: CacheMode = "auto"
    """device keeps the decoded set on the device. none streams it through workers. auto is device for 8-bit
    sets of one image size under 2 GiB, otherwise none."""
    workers: Annotated[int | None, Ge(0), MAY_CHANGE] = None
    """Processes that decode images. Default: one per core, at most 8. 0 decodes in the main process."""
    max_bad_samples: Annotated[float, Ge(0), Le(1), MAY_CHANGE] = 0.01
    """Maximum fraction of broken images before the run stops. They are replaced and recorded."""

    @property
    def num_workers(self) -> int:
        """The number of images that are decoded at the same time."""
        return min(8, os.cpu_count() or 1) if self.workers is None else self.workers


@dataclass(frozen=True)
class ColorDistortion:
    """Color distortion of a view. Each probability is that of an image to be changed."""

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Maximum change of the brightness, contrast and saturation factors from 1, and of the hue in turns, as
    in torchvision's ColorJitter."""
    jitter_prob: float = 0.8
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    solarize_prob: float = 0.0


SIMCLR_COLORS = (ColorDistortion((0.8, 0.8, 0.8, 0.2), gray_prob=0.2),) * 2
"""Color distortion of SimCLR's two views (Chen et al. 2020, appendix A, strength 1), without blur, as in its
experiments on small images."""
BYOL_COLORS = (
    ColorDistortion((0.4, 0.4, 0.2, 0.1), gray_prob=0.2, blur_prob=1.0),
    ColorDistortion((0.4, 0.4, 0.2, 0.1), gray_prob=0.2, blur_prob=0.1, solarize_prob=0.2),
)
"""Color distortion of the two views of BYOL (Grill et al. 2020, table 6) and MoCo v3."""


@dataclass(frozen=True)
class View:
    """Parameters of one view of an image: crop, flip and color distortion."""

    crop: CropMode = "random"
    """random: a box of random area, aspect ratio and position. fixed: a box of 7/8 of the largest sides at a
    random position. none: the largest central box, without a flip."""
    crop_min: float = CROP_SCALE[0]
    """Minimum area of a random crop, as a fraction of the image area."""
    flip: bool = True
    colors: ColorDistortion | None = None


@part
class ViewConfig:
    """Crops and colors."""

    crop: CropMode = "random"
    """random crops have random areas and positions. fixed crops have 7/8 of the largest sides and random
    positions. none is the largest central crop, without flips."""
    crop_min: Annotated[float, Gt(0), Le(1)] = CROP_SCALE[0]
    """Minimum area of a random crop, as a fraction of the image area."""
    color_jitter: Annotated[float, Ge(0), Le(2), RESEARCH] = 0.0
    """Strength of the color jitter: brightness, contrast and saturation change by up to this fraction, the
    hue by up to a quarter of it. It lowers accuracy (MAE, table 1e). Images without 3 channels change in
    brightness and contrast only."""

    @property
    def view(self) -> View:
        """The view that a masked autoencoder is trained on."""
        j = self.color_jitter
        return View(
            self.crop, self.crop_min, colors=ColorDistortion((j, j, j, j / 4), jitter_prob=1.0) if j else None
        )


@part
class AugmentConfig:
    """Augmentation. The defaults are those of the official fine-tuning."""

    RENAMED: ClassVar[Mapping[str, str]] = {"erase": "erase_prob"}

    crop_min: Annotated[float, Gt(0), Le(1)] = FINETUNING_CROP_MIN
    """Minimum area of a random crop, as a fraction of the image area."""
    flip: bool = True
    """Flip images horizontally with probability 0.5."""
    randaugment: Annotated[Text | None, BeforeValidator(_parse_none)] = RANDAUGMENT
    """Policy string of timm's RandAugment, or none. Needs 8-bit RGB images."""
    erase_prob: Annotated[float, Ge(0), Le(1)] = 0.25
    """Probability of random erasing: a rectangle of the image is replaced by noise."""
