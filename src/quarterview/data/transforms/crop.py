"""Random resized crop, flip and normalisation, keyed, one image or a batch at a time.

The crop is torchvision's `RandomResizedCrop`, with its numbers drawn by `quarterview.rng`. A crop, a resize
and a flip are together one linear map per axis, so a batch of equal-sized images is augmented on
its device by two matrix products; single images of any size go through torch's kernels. Both
are bicubic with antialiasing.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview import rng
from quarterview.data.config import CROP_SCALE

CROP_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_CUBIC = -0.5  # Keys' parameter, that of Pillow and of torch's antialiased bicubic


def random_crops(
    seed: int,
    epochs: Tensor,
    ids: Tensor,
    sizes: Tensor,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_ASPECT,
    single_draw: bool = False,
    purpose: str = "crop",
) -> tuple[Tensor, Tensor]:
    """The crop box and the flip of each sample.

    Ten boxes are proposed; the first that fits is taken, and the largest central one of an allowed
    aspect if none does. With `single_draw` one is proposed, and cut down to the image where it
    sticks out, as in BYOL and in the official linear probe.

    Args:
        epochs, ids: int64 [B].
        sizes: int64 [B, 2], height and width of each image.
        scale: least and greatest area of a box, as a share of the image's.
        ratio: least and greatest width of a box over its height.
        purpose: another one draws other boxes.

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
    return torch.where(fits.any(dim=1)[:, None], boxes, _central_boxes(sizes, ratio)), flips


def _central_boxes(sizes: Tensor, ratio: tuple[float, float]) -> Tensor:
    height, width = sizes.unbind(1)
    w = torch.minimum(width, (height * ratio[1]).round().long())
    h = torch.minimum(height, (width / ratio[0]).round().long())
    return torch.stack([(height - h) // 2, (width - w) // 2, h, w], dim=1)


def eval_box(
    height: int, width: int, image_size: Sequence[int], crop_pct: float = 1.0
) -> tuple[int, int, int, int]:
    """The largest central box of the wanted aspect ratio: top, left, height, width.

    Args:
        crop_pct: the sides of the box as a share of the largest; 0.875 is the same as to resize the
            shorter side to 256 and cut out the central 224.
    """
    scale = min(height / image_size[0], width / image_size[1]) * crop_pct
    h, w = max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(pixels: Tensor, box: Sequence[int], image_size: Sequence[int], flip: bool = False) -> Tensor:
    """Crop one image [C, H, W] to `box` and resize it to [C, *image_size]; keeps its dtype."""
    top, left, height, width = (int(n) for n in box)
    pixels = pixels[:, top : top + height, left : left + width]
    if (height, width) != tuple(image_size):
        pixels = F.interpolate(pixels[None], tuple(image_size), mode="bicubic", antialias=True)[0]
    return pixels.flip(2) if flip else pixels


def crop_resize_batch(images: Tensor, boxes: Tensor, flips: Tensor, image_size: Sequence[int]) -> Tensor:
    """Crop, resize and flip each image of a batch, on its device.

    Args:
        images: uint8 [B, C, H, W].
        boxes: int64 [B, 4] of top, left, height, width.
        flips: bool [B].

    Returns:
        float32 [B, C, *image_size] in [0, 255].
    """
    rows = _resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], image_size[0])  # [B, h, H]
    columns = _resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], image_size[1])  # [B, w, W]
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    x = images.float() @ columns.transpose(1, 2)[:, None]  # [B, C, H, w]
    return (rows[:, None] @ x).clamp(0, 255)  # [B, C, h, w]: bicubic may overshoot


def _resize_matrix(start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """Rows of weights that resize ``start … start + length`` of an axis to `out`: [B, out, size]."""
    start, length = start[:, None, None].float(), length[:, None, None].float()
    scale = length / out
    centre = start + (torch.arange(out, device=start.device)[None, :, None] + 0.5) * scale
    place = torch.arange(size, device=start.device)[None, None, :] + 0.5
    weights = _cubic((place - centre) / scale.clamp(min=1))
    weights = weights * ((place > start) & (place < start + length))
    return weights / weights.sum(dim=2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [0, 1]; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def normalise(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """float [B, C, H, W] in [0, 1] -> (images - mean) / std, a number a channel."""
    shift, scale = (torch.as_tensor(x, device=images.device)[:, None, None] for x in (mean, std))
    return (images - shift) / scale


def denormalise(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """The inverse of `normalise`."""
    shift, scale = (torch.as_tensor(x, device=images.device)[:, None, None] for x in (mean, std))
    return images * scale + shift
