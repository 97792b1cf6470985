"""What the decoder learns to predict.

A target is a module: it says how many numbers it wants for a patch, makes them from the true
patches, and judges predictions. Pixels are here; PCA, HOG and token targets join behind the same
three names.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class Target(Protocol):
    """One answer to "what should be reconstructed?" (He et al. 2021, table 1d)."""

    width: int
    """How many numbers the decoder predicts for a patch."""

    def __call__(self, images: Tensor, patches: Tensor, wanted: Tensor | None) -> Tensor:
        """The truth for some patches, from whole images, as targets may look beyond a patch.

        Args:
            images: float [B, C, H, W], normalised.
            patches: float [B, L, p*p*C], the same images cut up.
            wanted: int64 [B, K], the patches that are asked for; None asks for all.

        Returns:
            float32 [B, K, width]; token targets give int64 [B, K].
        """
        ...

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        """One error a patch: float32 [...], from pred [..., width] and what `__call__` gave."""
        ...

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> Tensor | None:
        """Patches [..., p*p*C] that a person can look at, given a guess of each patch's mean and
        standard deviation [..., 1]; None if the prediction is no picture."""
        ...


class PixelTarget(nn.Module):
    """The pixels of the patch, or its pixels normalised by their own mean and deviation.

    The normalisation is over all p*p*C values of the patch together, with the unbiased variance
    and the epsilon inside the root (He et al. 2021, section 3 and the official code).
    """

    def __init__(self, width: int, normalised: bool) -> None:
        super().__init__()
        self.width = width
        self.normalised = normalised

    def forward(self, images: Tensor, patches: Tensor, wanted: Tensor | None) -> Tensor:
        patches = (patches if wanted is None else take(patches, wanted)).float()
        if not self.normalised:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), truth, reduction="none").mean(dim=-1)

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return pred.float() * std + mean if self.normalised else pred.float()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [N, K] of x [B, L, D]: [N, K, D].

    N is a multiple of B: each image in x serves N / B lists of rows, which follow one another. So an
    image with several masks is held once.
    """
    if len(x) == 1:
        return x[0][index]
    rows = index.reshape(len(x), -1, 1).expand(-1, -1, x.shape[2])  # [B, N / B * K, D]
    return x.gather(1, rows).view(*index.shape, x.shape[2])


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch: float [..., 1] twice, epsilon inside the root."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return mean, (variance + NORM_EPS).sqrt()


def nearness(of: Tensor, to: Tensor, columns: int) -> Tensor:
    """Weights that sum to 1 over the patches `to`, falling with the fourth power of distance.

    Args:
        of, to: int64 [B, K] and [B, V], patch indices that have none in common.
        columns: of patches.

    Returns:
        float32 [B, K, V].
    """
    rows_and_columns = [torch.stack([i // columns, i % columns], dim=2).float() for i in (of, to)]
    weights = torch.cdist(*rows_and_columns) ** -4.0
    return weights / weights.sum(dim=2, keepdim=True)
