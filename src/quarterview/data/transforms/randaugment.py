"""RandAugment and random erasing of training images.

The random numbers depend only on (seed, epoch, sample), so the result is the same in every process and batch.
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
from quarterview.errors import UserError, invalid

_MAX_TRANSLATE_RATIO = 0.45  # maximum translation of RandAugment, as a fraction of the shorter side
_ERASE_SCALE = (0.02, 1 / 3)  # area of the rectangle, as a fraction of the image area
_ERASE_RATIO = (0.3, 1 / 0.3)  # aspect ratio of the rectangle
_ATTEMPTS = 10


def apply_randaugment(
    image: Tensor, policy: str, fill_color: tuple[float, ...], seed: int, epoch: int, sample: int
) -> Tensor:
    """Apply timm's RandAugment to one image, with random numbers from `quarterview.rng`.

    Args:
        image: uint8 [3, H, W].
        policy: policy string of timm, such as `RANDAUGMENT`.
        fill_color: color in [0, 1] of pixels that are moved in from outside the image.

    Returns:
        uint8 [3, H, W].

    Raises:
        UserError: if the image is not 8-bit RGB, the policy is invalid, or timm is not installed.
    """
    if image.dtype != torch.uint8 or len(image) != 3:
        raise UserError("RandAugment needs 8-bit RGB images. Use --randaugment none for other images.")
    transform = _create_randaugment(policy, min(image.shape[1:]), fill_color)
    with rng.seeded(seed, "randaugment", epoch, sample):
        changed = transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1).contiguous()


def check_randaugment_policy(policy: str) -> None:
    """Check a policy string.

    Raises:
        UserError: if the policy is invalid.
    """
    _create_randaugment(policy, 32, (0.5,))


@functools.cache
def _create_randaugment(
    policy: str, short_side: int, fill_color: tuple[float, ...]
) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform  # slow to import

    try:
        return rand_augment_transform(
            policy,
            {
                "translate_const": int(short_side * _MAX_TRANSLATE_RATIO),
                "img_mean": tuple(min(255, round(255 * value)) for value in fill_color),
                "interpolation": Resampling.BICUBIC,
            },
        )
    except (AssertionError, ValueError, KeyError):
        raise invalid("--randaugment", policy, f"a policy of timm, such as {RANDAUGMENT}, or none") from None


def apply_random_erasing(images: Tensor, prob: float, seed: int, epochs: Tensor, ids: Tensor) -> Tensor:
    """Apply random erasing (Zhong et al. 2017) to a batch on its device, with noise for each pixel.

    The rectangle has 2% to 1/3 of the area and an aspect ratio of 0.3 to 1 / 0.3; it is the first of ten
    proposals that is smaller than the image. The noise is one image of normal random numbers per seed, rolled
    by random offsets for each sample: independent within an image, and fast.

    Args:
        images: float [B, C, H, W], normalised.
        prob: probability of an image to be erased.
        epochs, ids: int64 [B].
    """
    channels, height, width = images.shape[1:]
    u = rng.uniform(seed, "erase", epochs, ids, 3 + 4 * _ATTEMPTS)
    area_u, aspect_u, top_u, left_u = u[:, 3:].view(-1, _ATTEMPTS, 4).unbind(2)  # each [B, attempts]
    area = height * width * (_ERASE_SCALE[0] + (_ERASE_SCALE[1] - _ERASE_SCALE[0]) * area_u)
    low, high = math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])
    aspect = (low + (high - low) * aspect_u).exp()
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    h, w, top_u, left_u = (x.gather(1, first) for x in (h, w, top_u, left_u))  # each [B, 1]
    top, left = (top_u * (height - h + 1)).floor(), (left_u * (width - w + 1)).floor()
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    box = ((rows >= top) & (rows < top + h))[:, :, None] & ((columns >= left) & (columns < left + w))[:, None]
    erased = box & ((u[:, :1] < prob) & fits.any(dim=1, keepdim=True))[:, :, None]  # [B, H, W]

    noise = _draw_normal_image(seed, channels, height, width, images.device)
    row = (rows + (u[:, 1:2] * height).long()) % height  # [B, H]
    column = (columns + (u[:, 2:3] * width).long()) % width
    rolled = noise[:, row[:, :, None], column[:, None, :]].transpose(0, 1)  # [B, C, H, W]
    return torch.where(erased[:, None], rolled, images)


@functools.lru_cache(maxsize=4)
def _draw_normal_image(seed: int, channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """Draw standard normal numbers [C, H, W], by the Box-Muller transform."""
    ids = torch.arange(channels, device=device)
    u = rng.uniform(seed, "erase noise", 0, ids, 2 * height * width).view(channels, 2, height, width)
    radius = (-2 * (1 - u[:, 0]).log()).sqrt()
    return radius * (2 * math.pi * u[:, 1]).cos()
