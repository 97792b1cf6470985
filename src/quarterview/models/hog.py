"""Histograms of oriented gradients (HOG, Dalal and Triggs 2005), the target of MaskFeat (Wei et al. 2022).

Letters in shapes: B images, C channels, H×W pixels, c the side of a cell, O orientations.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.models.config import HOG_ORIENTATIONS

EPS = 1e-5
"""Epsilon of the normalisation, added in squares to the norm of a histogram, in units of the pixels' standard
deviation. The faintest edge of an 8-bit image in a cell of 8 pixels is far above it; the rounding errors of a
flat image are far below it."""


def compute_hog(images: Tensor, cell_size: int, orientations: int = HOG_ORIENTATIONS) -> Tensor:
    """Compute the L2-normalised HOG of each cell and channel.

    The gradient of a pixel is the difference of its two neighbours, without smoothing, and 0 at the image
    border. Its magnitude is added to the one bin that its direction falls in. The histogram of a flat cell is
    zero.

    Args:
        images: float [B, C, H, W]. A shift and a scale of a channel do not change the result.
        cell_size: the side of a cell in pixels, a divisor of H and W.
        orientations: the number of bins, O.

    Returns:
        float [B, C, O, H/c, W/c]. Bin i holds directions from i to i + 1 times 180° / O, where 0° is along a
        row and 90° along a column.
    """
    down, right = torch.zeros_like(images), torch.zeros_like(images)
    down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
    right[:, :, :, 1:-1] = images[:, :, :, 2:] - images[:, :, :, :-2]
    magnitude = torch.hypot(down, right)
    angle = torch.atan2(down, torch.where(down == 0, right.abs(), right))  # 180° is the same as 0°
    bins = (angle * (orientations / math.pi)).floor().remainder(orientations).to(torch.int16)
    sums = [F.avg_pool2d(torch.where(bins == i, magnitude, 0.0), cell_size) for i in range(orientations)]
    histograms = torch.stack(sums, dim=2)  # [B, C, O, H/c, W/c]
    return histograms / (histograms.square().sum(dim=2, keepdim=True) + EPS**2).sqrt()
