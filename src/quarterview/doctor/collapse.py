"""Whether an encoder still tells images apart."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.evaluation.features import pixel_features
from quarterview.models.mae import MaskedAutoencoder

_BATCH = 64


class Spread(NamedTuple):
    """How different the features of different images are."""

    effective_rank: float
    """See `effective_rank`."""
    variance: float
    """Mean variance of a feature over the images."""
    share: float
    """Of the features' mean square, what varies from image to image: 0 if all images look the same."""
    similarity: float
    """Mean cosine between the features of two images."""


def effective_rank(features: Tensor) -> float:
    """The exponential of the entropy of the singular values, centred (Roy and Vetterli 2007).

    D for features of identity covariance, 1 if they lie on a line, and 0 if they are all equal; nan if
    any is not finite.

    Args:
        features: float [N, D].
    """
    if not features.isfinite().all():
        return float("nan")
    values = torch.linalg.svdvals((features - features.mean(dim=0)).double())
    total = float(values.sum())
    if total <= 1e-9 * float(features.double().norm()) or total == 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def spread(features: Tensor) -> Spread:
    """All four measures of float [N, D]."""
    features = features.double()
    variance = features.var(dim=0, correction=0)
    square = float(features.square().sum(dim=1).mean())
    unit = F.normalize(features, dim=1)
    count = len(unit)
    similarity = (float(unit.sum(dim=0).square().sum()) - count) / (count * (count - 1)) if count > 1 else 1.0
    return Spread(
        effective_rank(features),
        float(variance.mean()),
        float(variance.sum()) / square if square else 0.0,
        similarity,
    )


@torch.no_grad()
def encoder_spread(model: MaskedAutoencoder, images: Tensor) -> Spread:
    """Of the mean patch tokens of whole images, float [B, C, H, W], normalised."""
    cls = model.config.cls_tokens
    parts = [model.encode(some)[:, cls:].float().mean(dim=1).cpu() for some in images.split(_BATCH)]
    return spread(torch.cat(parts))


def image_spread(images: Tensor) -> Spread:
    """Of the pixels themselves, at most 32 on a side: what there is to be told apart."""
    return spread(pixel_features(images.float().cpu()))
