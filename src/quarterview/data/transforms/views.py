"""What is made of an image on its way to the model: a crop, a flip, and other colours; once, or twice.

A masked autoencoder sees one view, and needs little of this; methods that compare two views of an
image live by it (He et al. 2021, table 1e). Everything is keyed by (seed, epoch, sample, view).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.transforms.crop import CROP_SCALE, eval_box, random_crops
from quarterview.errors import UserError, check_types

CropKind = Literal["random", "fixed", "none"]
FIXED_CROP = 224 / 256
"""Side of a crop of fixed size, as a share of the largest box."""
BLUR_SIGMA = (0.1, 2.0)
"""Least and greatest deviation of a blur, in pixels."""
_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, with torchvision's digits
_NUMBERS = 9  # drawn for the colours of a view


@dataclass(frozen=True)
class Colours:
    """How the colours of a view are distorted. Shares are of the images to which each is done."""

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """How far brightness, contrast and saturation may go from 1, and the hue from where it is, in turns."""
    jitter_share: float = 0.8
    grey: float = 0.0
    blur: float = 0.0
    solarise: float = 0.0


SIMCLR = Colours((0.8, 0.8, 0.8, 0.2), grey=0.2)
"""Chen et al. 2020, appendix A, at full strength; small pictures are not blurred there, nor here."""
BYOL = (
    Colours((0.4, 0.4, 0.2, 0.1), grey=0.2, blur=1.0),
    Colours((0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.1, solarise=0.2),
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
    colours: Colours | None = None


@dataclass(frozen=True)
class ViewConfig:
    """What is done to images in pre-training. The defaults are the paper's."""

    crop: CropKind = "random"
    """Train on boxes of random size and place, on boxes of one size at random places (fixed, seven eighths of
    the largest), or on the central box without flips (none)."""
    crop_min: float = CROP_SCALE[0]
    """The smallest share of the image's area that a random crop keeps."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation of each image by up to this share, and its hue by a quarter
    of it (table 1e: harms). Of images with one channel or many, brightness and contrast alone."""

    def __post_init__(self) -> None:
        check_types(self, ViewConfig)
        if not 0 < self.crop_min <= 1:
            raise UserError(f"crop_min {self.crop_min}; accepted: a number above 0, at most 1")
        if not 0 <= self.color_jitter <= 2:
            raise UserError(f"a color jitter of {self.color_jitter}; accepted: 0 to 2")

    @property
    def view(self) -> View:
        """How the one view is made."""
        j = self.color_jitter
        colours = Colours((j, j, j, j / 4), jitter_share=1.0) if j else None
        return View(self.crop, self.crop_min, colours=colours)


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


def distort(images: Tensor, colours: Colours, number: int, seed: int, epochs: Tensor, ids: Tensor) -> Tensor:
    """Other colours for each image of a batch, on its device.

    In this order, each where the draw says so: brightness, contrast, saturation and hue; grey; blur;
    solarising. The first four and the last are torchvision's, with a factor an image.

    Args:
        images: float [B, C, H, W] in [0, 1].
        number: of the view.
        epochs, ids: int64 [B], on the images' device.
    """
    u = rng.uniform(seed, f"colours {number + 1}", epochs, ids, _NUMBERS)[:, :, None, None, None]
    brightness, contrast, saturation, hue = colours.jitter
    shifts = 2 * u[:, :4] - 1
    jittered = scale_brightness(images, (1 + brightness * shifts[:, 0]).clamp(min=0))
    jittered = scale_contrast(jittered, (1 + contrast * shifts[:, 1]).clamp(min=0))
    if images.shape[1] == 3:
        jittered = scale_saturation(jittered, (1 + saturation * shifts[:, 2]).clamp(min=0))
        if hue:
            jittered = turn_hue(jittered, hue * shifts[:, 3])
    images = torch.where(u[:, 4] < colours.jitter_share, jittered, images)
    if colours.grey:
        images = torch.where(u[:, 5] < colours.grey, grey_of(images), images)
    if colours.blur:
        sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[:, 6].flatten()
        images = torch.where(u[:, 7] < colours.blur, blurred(images, sigma), images)
    if colours.solarise:
        images = torch.where((u[:, 8] < colours.solarise) & (images >= 0.5), 1 - images, images)
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
