"""Histograms of oriented gradients (Dalal and Triggs 2005), which MaskFeat predicts (Wei et al. 2022).

Letters in shapes: B images, C channels, H×W pixels, c the side of a cell, O orientations.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.models.config import HOG_ORIENTATIONS

EPS = 1e-5
"""What is added to the length of a histogram, in squares and deviations of the pixels: far below the faintest
edge of an 8-bit picture in cells of 8 pixels, far above what rounding leaves of a flat one."""


def oriented_gradients(images: Tensor, cell: int, orientations: int = HOG_ORIENTATIONS) -> Tensor:
    """The histogram of each cell and channel, of length 1, or of zeros where the cell is flat.

    A gradient is the difference of the two neighbours, without smoothing, and 0 across the rim of the
    picture. Its length is its vote, for the one bin that its direction falls in.

    Args:
        images: float [B, C, H, W], normalised: what a channel was shifted and scaled by cancels.
        cell: side in pixels, a divisor of H and W.

    Returns:
        float [B, C, O, H/c, W/c]. Bin i holds directions from i to i + 1 times 180° / O, where 0° is
        along a row, and 90° along a column.
    """
    down, right = torch.zeros_like(images), torch.zeros_like(images)
    down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
    right[:, :, :, 1:-1] = images[:, :, :, 2:] - images[:, :, :, :-2]
    length = torch.hypot(down, right)
    angle = torch.atan2(down, torch.where(down == 0, right.abs(), right))  # half a turn is none
    falls_in = (angle * (orientations / math.pi)).floor().remainder(orientations).to(torch.int16)
    votes = [F.avg_pool2d(torch.where(falls_in == i, length, 0.0), cell) for i in range(orientations)]
    histograms = torch.stack(votes, dim=2)  # [B, C, O, H/c, W/c]
    return histograms / (histograms.square().sum(dim=2, keepdim=True) + EPS**2).sqrt()
