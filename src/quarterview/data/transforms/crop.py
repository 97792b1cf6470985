"""Random resized crops, flips and normalisation, of single images and of batches.

The crops are those of torchvision's `RandomResizedCrop`, with random numbers from `quarterview.rng`. Crop,
resize and flip are one linear map per axis, so a batch of images of one size is transformed on its device by
two matrix products. Single images of any size use `torch.nn.functional.interpolate`. Both are bicubic with
antialiasing.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview import rng
from quarterview.data.config import CROP_SCALE

CROP_RATIO = (3 / 4, 4 / 3)
"""Minimum and maximum aspect ratio, width over height, of a random crop."""
_ATTEMPTS = 10
_BICUBIC_A = -0.5  # parameter a of Keys' kernel, as in Pillow and in torch's antialiased bicubic


def draw_random_crops(
    seed: int,
    epochs: Tensor,
    ids: Tensor,
    sizes: Tensor,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
    single_draw: bool = False,
    purpose: str = "crop",
) -> tuple[Tensor, Tensor]:
    """Draw the crop box and the flip of each sample.

    The box is the first of ten random proposals that fits into the image, or else the largest center box of
    an allowed aspect ratio. With `single_draw`, there is one proposal, whose sides are clamped to the image,
    as in BYOL and in the official linear probe.

    Args:
        epochs, ids: int64 [B].
        sizes: int64 [B, 2], height and width of each image.
        scale: minimum and maximum area of a box, as a fraction of the image area.
        ratio: minimum and maximum aspect ratio of a box, width over height.
        purpose: name of the random draw. Different names give independent boxes.

    Returns:
        Boxes int64 [B, 4] of top, left, height, width; flips bool [B].
    """
    attempts = 1 if single_draw else _ATTEMPTS
    u = rng.uniform(seed, purpose, epochs, ids, 4 * attempts + 1).double()
    flips = u[:, -1] < 0.5
    area_u, aspect_u, top_u, left_u = u[:, :-1].view(-1, attempts, 4).unbind(2)  # each [B, attempts]
    height, width = sizes[:, :1], sizes[:, 1:]  # [B, 1]

    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * aspect_u).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    if single_draw:
        w, h = w.clamp(min=1).minimum(width), h.clamp(min=1).minimum(height)
    top, left = (top_u * (height - h + 1)).long(), (left_u * (width - w + 1)).long()
    proposals = torch.stack([top, left, h, w], dim=2)  # [B, attempts, 4]

    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    first = fits.to(torch.uint8).argmax(dim=1)
    boxes = proposals[torch.arange(len(ids)), first]
    return torch.where(fits.any(dim=1)[:, None], boxes, _get_center_boxes(sizes, ratio)), flips


def _get_center_boxes(sizes: Tensor, ratio: tuple[float, float]) -> Tensor:
    """Return the largest center box of an allowed aspect ratio for each image size: int64 [B, 4]."""
    height, width = sizes.unbind(1)
    w = torch.minimum(width, (height * ratio[1]).round().long())
    h = torch.minimum(height, (width / ratio[0]).round().long())
    return torch.stack([(height - h) // 2, (width - w) // 2, h, w], dim=1)


def get_center_box(
    height: int, width: int, image_size: Sequence[int], crop_pct: float = 1.0
) -> tuple[int, int, int, int]:
    """Return the largest center box with the aspect ratio of `image_size`: top, left, height, width.

    Args:
        crop_pct: sides of the box as a fraction of the largest ones. 0.875 is equivalent to resizing the
            shorter side to 256 and taking the center crop of 224.
    """
    scale = min(height / image_size[0], width / image_size[1]) * crop_pct
    h, w = max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(image: Tensor, box: Sequence[int], image_size: Sequence[int], flip: bool = False) -> Tensor:
    """Crop one image [C, H, W] to `box` (top, left, height, width) and resize it to [C, *image_size].

    The dtype is unchanged.
    """
    top, left, height, width = (int(n) for n in box)
    image = image[:, top : top + height, left : left + width]
    if (height, width) != tuple(image_size):
        image = F.interpolate(image[None], tuple(image_size), mode="bicubic", antialias=True)[0]
    return image.flip(2) if flip else image


def crop_resize_batch(images: Tensor, boxes: Tensor, flips: Tensor, image_size: Sequence[int]) -> Tensor:
    """Crop, resize and flip each image of a batch, on its device.

    Args:
        images: uint8 [B, C, H, W].
        boxes: int64 [B, 4] of top, left, height, width.
        flips: bool [B].

    Returns:
        float32 [B, C, *image_size] in [0, 255].
    """
    rows = _make_resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], image_size[0])  # [B, h, H]
    columns = _make_resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], image_size[1])  # [B, w, W]
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    x = images.float() @ columns.transpose(1, 2)[:, None]  # [B, C, H, w]
    return (rows[:, None] @ x).clamp(0, 255)  # [B, C, h, w], clamped because bicubic resizing overshoots


def _make_resize_matrix(start: Tensor, length: Tensor, size: int, out_size: int) -> Tensor:
    """Return matrices [B, out_size, size] that crop an axis to `length` from `start` and resize it."""
    start, length = start[:, None, None].float(), length[:, None, None].float()
    scale = length / out_size
    centers = start + (torch.arange(out_size, device=start.device)[None, :, None] + 0.5) * scale
    positions = torch.arange(size, device=start.device)[None, None, :] + 0.5
    weights = _bicubic_kernel((positions - centers) / scale.clamp(min=1))
    weights = weights * ((positions > start) & (positions < start + length))
    return weights / weights.sum(dim=2, keepdim=True)


def _bicubic_kernel(x: Tensor) -> Tensor:
    """Compute Keys' cubic convolution kernel."""
    x = x.abs()
    near = ((_BICUBIC_A + 2) * x - (_BICUBIC_A + 3)) * x * x + 1
    far = ((_BICUBIC_A * x - 5 * _BICUBIC_A) * x + 8 * _BICUBIC_A) * x - 4 * _BICUBIC_A
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images in [0, 255] to float32 in [0, 1]. The values of float images are unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Normalise images float [B, C, H, W] in [0, 1] by the mean and standard deviation of each channel."""
    shift, scale = (torch.as_tensor(x, device=images.device)[:, None, None] for x in (mean, std))
    return (images - shift) / scale


def denormalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Invert `normalize`."""
    shift, scale = (torch.as_tensor(x, device=images.device)[:, None, None] for x in (mean, std))
    return images * scale + shift
