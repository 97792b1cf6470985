"""Views of an image: a crop, a flip and color distortion.

Masked autoencoders need little augmentation of one view; contrastive methods depend on strong augmentation of
two views (He et al. 2021, table 1e). The random numbers depend only on (seed, epoch, sample, view).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.config import ColorDistortion, View
from quarterview.data.transforms.crop import draw_random_crops, get_center_box

FIXED_CROP_PCT = 224 / 256
"""Sides of a crop of fixed size, as a fraction of those of the largest box."""
BLUR_SIGMA = (0.1, 2.0)
"""Minimum and maximum standard deviation of the Gaussian blur, in pixels."""
_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, rounded as in torchvision
_NUM_UNIFORMS = 9  # per sample, for the color distortion of a view


# ---------------------------------------------------------------------- crops


def draw_view_crops(
    view: View,
    view_index: int,
    image_size: Sequence[int],
    seed: int,
    epochs: Tensor,
    ids: Tensor,
    sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw the crop box and the flip of one view of each sample.

    Args:
        view_index: index of the view, from 0.
        image_size: height and width that the boxes will be resized to.
        epochs, ids: int64 [B].
        sizes: int64 [B, 2], height and width of each image.

    Returns:
        Boxes int64 [B, 4] of top, left, height, width; flips bool [B].
    """
    purpose = "crop" if view_index == 0 else f"crop {view_index + 1}"
    if view.crop == "random":
        boxes, flips = draw_random_crops(
            seed, epochs, ids, sizes, scale=(view.crop_min, 1.0), purpose=purpose
        )
        return boxes, flips & view.flip
    crop_pct = FIXED_CROP_PCT if view.crop == "fixed" else 1.0
    boxes = torch.tensor([get_center_box(h, w, image_size, crop_pct) for h, w in sizes.tolist()]).view(-1, 4)
    if view.crop == "none":
        return boxes, torch.zeros(len(ids), dtype=torch.bool)
    u = rng.uniform(seed, purpose, epochs, ids, 3)
    num_positions = sizes - boxes[:, 2:] + 1
    corners = (u[:, :2] * num_positions).long()
    return torch.cat([corners, boxes[:, 2:]], dim=1), (u[:, 2] < 0.5) & view.flip


# ---------------------------------------------------------------------- colors


def distort_colors(
    images: Tensor, colors: ColorDistortion, view_index: int, seed: int, epochs: Tensor, ids: Tensor
) -> Tensor:
    """Distort the colors of each image of a batch, on its device.

    The order is: brightness, contrast, saturation and hue; grayscale; Gaussian blur; solarisation. All except
    the blur are as in torchvision, with random numbers for each image.

    Args:
        images: float [B, C, H, W] in [0, 1].
        view_index: index of the view, from 0.
        epochs, ids: int64 [B], on the device of the images.
    """
    u = rng.uniform(seed, f"colours {view_index + 1}", epochs, ids, _NUM_UNIFORMS)[:, :, None, None, None]
    brightness, contrast, saturation, hue = colors.jitter
    shifts = 2 * u[:, :4] - 1
    jittered = adjust_brightness(images, (1 + brightness * shifts[:, 0]).clamp(min=0))
    jittered = adjust_contrast(jittered, (1 + contrast * shifts[:, 1]).clamp(min=0))
    if images.shape[1] == 3:
        jittered = adjust_saturation(jittered, (1 + saturation * shifts[:, 2]).clamp(min=0))
        if hue:
            jittered = adjust_hue(jittered, hue * shifts[:, 3])
    images = torch.where(u[:, 4] < colors.jitter_prob, jittered, images)
    if colors.gray_prob:
        images = torch.where(u[:, 5] < colors.gray_prob, to_grayscale(images), images)
    if colors.blur_prob:
        sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[:, 6].flatten()
        images = torch.where(u[:, 7] < colors.blur_prob, gaussian_blur(images, sigma), images)
    if colors.solarize_prob:
        images = torch.where((u[:, 8] < colors.solarize_prob) & (images >= 0.5), 1 - images, images)
    return images


def to_grayscale(images: Tensor) -> Tensor:
    """Convert images to float [B, 1, H, W]: the luma of three channels, the mean of any other number."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    weights = torch.tensor(_GRAY_WEIGHTS, device=images.device).view(3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by a factor, float [B, 1, 1, 1]."""
    return (images * factor).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Change the contrast of each image by a factor, float [B, 1, 1, 1], around its mean gray value."""
    mean = to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    return (factor * images + (1 - factor) * mean).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Change the saturation of each image by a factor, float [B, 1, 1, 1]. 0 is grayscale."""
    return (factor * images + (1 - factor) * to_grayscale(images)).clamp(0, 1)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Shift the hue of each RGB image by a factor, float [B, 1, 1, 1], in turns of the color circle.

    A color of value V and chroma K has the channels V - K * clamp(min(x, 4 - x), 0, 1), where x is its hue in
    sixths of a turn plus 5, 3 and 1 for red, green and blue, modulo 6 (HSV to RGB).
    """
    value, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = value - low
    red, green, blue = images.split(1, dim=1)
    safe_chroma = torch.where(chroma > 0, chroma, 1)  # avoids division by zero for gray
    sixths = torch.where(
        value == red,
        (green - blue) / safe_chroma,
        torch.where(value == green, 2 + (blue - red) / safe_chroma, 4 + (red - green) / safe_chroma),
    )
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(3, 1, 1)
    x = (offsets + sixths + 6 * factor) % 6
    return value - chroma * torch.minimum(x, 4 - x).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image by a Gaussian of standard deviation `sigma`, float [B], renormalised at the edges."""
    rows, columns = (_make_blur_matrix(sigma, side) for side in images.shape[2:])
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def _make_blur_matrix(sigma: Tensor, side: int) -> Tensor:
    """Return matrices float [B, side, side] that blur an axis. Each row sums to 1."""
    positions = torch.arange(side, device=sigma.device)
    distance = (positions[:, None] - positions[None, :]).float()
    weights = (-0.5 * (distance / sigma[:, None, None]) ** 2).exp()
    return weights / weights.sum(dim=2, keepdim=True)
