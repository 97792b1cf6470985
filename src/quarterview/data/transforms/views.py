"""What is made of an image on its way to the model: a crop, a flip, and other colours; once, or twice.

A masked autoencoder sees one view, and needs little of this; methods that compare two views of an
image live by it (He et al. 2021, table 1e). Everything is keyed by (seed, epoch, sample, view).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.config import ColorDistortion, View
from quarterview.data.transforms.crop import eval_box, random_crops

FIXED_CROP = 224 / 256
"""Side of a crop of fixed size, as a share of the largest box."""
BLUR_SIGMA = (0.1, 2.0)
"""Least and greatest deviation of a blur, in pixels."""
_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, with torchvision's digits
_NUMBERS = 9  # drawn for the colours of a view


# ---------------------------------------------------------------------- where


def boxes_of(
    view: View,
    number: int,
    image_size: Sequence[int],
    seed: int,
    epochs: Tensor,
    ids: Tensor,
    sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """The crop box and the flip of each sample.

    Args:
        number: of the view, from 0.
        image_size: that the boxes are resized to.
        epochs, ids: int64 [B].
        sizes: int64 [B, 2], height and width of each image.

    Returns:
        Boxes int64 [B, 4] of top, left, height, width; flips bool [B].
    """
    purpose = "crop" if number == 0 else f"crop {number + 1}"
    if view.crop == "random":
        boxes, flips = random_crops(seed, epochs, ids, sizes, scale=(view.crop_min, 1.0), purpose=purpose)
        return boxes, flips & view.flip
    share = FIXED_CROP if view.crop == "fixed" else 1.0
    boxes = torch.tensor([eval_box(h, w, image_size, share) for h, w in sizes.tolist()]).view(-1, 4)
    if view.crop == "none":
        return boxes, torch.zeros(len(ids), dtype=torch.bool)
    u = rng.uniform(seed, purpose, epochs, ids, 3)
    room = sizes - boxes[:, 2:] + 1
    places = (u[:, :2] * room).long()
    return torch.cat([places, boxes[:, 2:]], dim=1), (u[:, 2] < 0.5) & view.flip


# ---------------------------------------------------------------------- colours


def distort(
    images: Tensor, colors: ColorDistortion, number: int, seed: int, epochs: Tensor, ids: Tensor
) -> Tensor:
    """Other colours for each image of a batch, on its device.

    In this order, each where the draw says so: brightness, contrast, saturation and hue; grey; blur;
    solarising. The first four and the last are torchvision's, with a factor an image.

    Args:
        images: float [B, C, H, W] in [0, 1].
        number: of the view.
        epochs, ids: int64 [B], on the images' device.
    """
    u = rng.uniform(seed, f"colours {number + 1}", epochs, ids, _NUMBERS)[:, :, None, None, None]
    brightness, contrast, saturation, hue = colors.jitter
    shifts = 2 * u[:, :4] - 1
    jittered = scale_brightness(images, (1 + brightness * shifts[:, 0]).clamp(min=0))
    jittered = scale_contrast(jittered, (1 + contrast * shifts[:, 1]).clamp(min=0))
    if images.shape[1] == 3:
        jittered = scale_saturation(jittered, (1 + saturation * shifts[:, 2]).clamp(min=0))
        if hue:
            jittered = turn_hue(jittered, hue * shifts[:, 3])
    images = torch.where(u[:, 4] < colors.jitter_prob, jittered, images)
    if colors.gray_prob:
        images = torch.where(u[:, 5] < colors.gray_prob, grey_of(images), images)
    if colors.blur_prob:
        sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[:, 6].flatten()
        images = torch.where(u[:, 7] < colors.blur_prob, blurred(images, sigma), images)
    if colors.solarize_prob:
        images = torch.where((u[:, 8] < colors.solarize_prob) & (images >= 0.5), 1 - images, images)
    return images


def grey_of(images: Tensor) -> Tensor:
    """float [B, 1, H, W]: luma of three channels, the mean of any other number."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    weights = torch.tensor(_GREY, device=images.device).view(3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def scale_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images multiplied by a factor each, float [B, 1, 1, 1]."""
    return (images * factor).clamp(0, 1)


def scale_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Images moved from the mean of their grey by a factor each."""
    mean = grey_of(images).mean(dim=(1, 2, 3), keepdim=True)
    return (factor * images + (1 - factor) * mean).clamp(0, 1)


def scale_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Images moved from their grey by a factor each."""
    return (factor * images + (1 - factor) * grey_of(images)).clamp(0, 1)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Images of three channels whose hue is turned, by float [B, 1, 1, 1] of a whole turn each.

    A colour of value V and chroma K has the channels V - K * clamp(min(x, 4 - x), 0, 1), where x is
    5, 3, 1 more than its hue in sixths, modulo 6.
    """
    value, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = value - low
    red, green, blue = images.split(1, dim=1)
    safe = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(3, 1, 1)
    x = (offsets + sixths + 6 * turns) % 6
    return value - chroma * torch.minimum(x, 4 - x).clamp(0, 1)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Images blurred by a Gaussian of deviation float [B] each; at an edge, of what there is."""
    rows, columns = (_blur_matrix(sigma, side) for side in images.shape[2:])
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def _blur_matrix(sigma: Tensor, side: int) -> Tensor:
    """float [B, side, side], rows that sum to 1."""
    place = torch.arange(side, device=sigma.device)
    distance = (place[:, None] - place[None, :]).float()
    weights = (-0.5 * (distance / sigma[:, None, None]) ** 2).exp()
    return weights / weights.sum(dim=2, keepdim=True)
