"""What is done to a training image beyond decoding it: crop, flip, RandAugment, random erasing.

Everything is keyed by (seed, epoch, sample): the same picture comes out wherever it is made.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

from quarterview import rng
from quarterview.data.config import RANDAUGMENT
from quarterview.errors import UserError

_TRANSLATION_SHARE = 0.45  # how far RandAugment may move a picture, of its shorter side
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10


def randaugment(
    pixels: Tensor, policy: str, mean: tuple[float, ...], seed: int, epoch: int, sample: int
) -> Tensor:
    """timm's RandAugment of one image, run under the keyed context.

    Args:
        pixels: uint8 [3, H, W].
        policy: in timm's words, such as `RANDAUGMENT`.
        mean: of the channels, in [0, 1]: what is filled in where the picture was moved away.

    Returns:
        uint8 [3, H, W].

    Raises:
        UserError: if the image is not 8-bit RGB.
    """
    if pixels.dtype != torch.uint8 or len(pixels) != 3:
        raise UserError("RandAugment needs 8-bit RGB images; accepted for others: --randaugment none")
    transform = _policy(policy, min(pixels.shape[1:]), mean)
    with rng.seeded(seed, "randaugment", epoch, sample):
        changed = transform(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1).contiguous()


def check_policy(policy: str) -> None:
    """Raises UserError if a policy is not in timm's form, or timm is not installed."""
    _policy(policy, 32, (0.5,))


@functools.cache
def _policy(policy: str, side: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    try:
        from timm.data.auto_augment import rand_augment_transform
    except ImportError:
        raise UserError(
            "RandAugment is timm's: pip install 'quarterview[timm]'; accepted without it: --randaugment none"
        ) from None
    try:
        return rand_augment_transform(
            policy,
            {
                "translate_const": int(side * _TRANSLATION_SHARE),
                "img_mean": tuple(min(255, round(255 * value)) for value in mean),
                "interpolation": Resampling.BICUBIC,
            },
        )
    except (AssertionError, ValueError, KeyError):
        raise UserError(f"randaugment {policy!r}; accepted: timm's form, such as {RANDAUGMENT}") from None


def erase(images: Tensor, share: float, seed: int, epochs: Tensor, ids: Tensor) -> Tensor:
    """Random erasing (Zhong et al. 2017) of a batch on its device, filled with noise pixel by pixel.

    A rectangle of 2% to a third of the area and an aspect ratio of 0.3 to 1 / 0.3, the first of ten
    proposals that is smaller than the image. The noise of a sample is one keyed image of normal
    numbers, rolled by keyed offsets: independent within an image, and cheap.

    Args:
        images: float [B, C, H, W], normalised.
        share: of the images that are erased.
        epochs, ids: int64 [B].
    """
    channels, height, width = images.shape[1:]
    u = rng.uniform(seed, "erase", epochs, ids, 3 + 4 * _ATTEMPTS)
    area_u, aspect_u, top_u, left_u = u[:, 3:].view(-1, _ATTEMPTS, 4).unbind(2)  # each [B, attempts]
    area = height * width * (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * area_u)
    low, high = math.log(_ERASED_ASPECT[0]), math.log(_ERASED_ASPECT[1])
    aspect = (low + (high - low) * aspect_u).exp()
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    h, w, top_u, left_u = (x.gather(1, first) for x in (h, w, top_u, left_u))  # each [B, 1]
    top, left = (top_u * (height - h + 1)).floor(), (left_u * (width - w + 1)).floor()
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    box = ((rows >= top) & (rows < top + h))[:, :, None] & ((columns >= left) & (columns < left + w))[:, None]
    erased = box & ((u[:, :1] < share) & fits.any(dim=1, keepdim=True))[:, :, None]  # [B, H, W]

    noise = _noise(seed, channels, height, width, images.device)
    row = (rows + (u[:, 1:2] * height).long()) % height  # [B, H]
    column = (columns + (u[:, 2:3] * width).long()) % width
    rolled = noise[:, row[:, :, None], column[:, None, :]].transpose(0, 1)  # [B, C, H, W]
    return torch.where(erased[:, None], rolled, images)


@functools.lru_cache(maxsize=4)
def _noise(seed: int, channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """Standard normal numbers [C, H, W], by the Box-Muller transform."""
    ids = torch.arange(channels, device=device)
    u = rng.uniform(seed, "erase noise", 0, ids, 2 * height * width).view(channels, 2, height, width)
    radius = (-2 * (1 - u[:, 0]).log()).sqrt()
    return radius * (2 * math.pi * u[:, 1]).cos()
