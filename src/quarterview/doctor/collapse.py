"""Measures of the collapse of an encoder: are the features of different images different?"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.evaluation.features import compute_pixel_features
from quarterview.models.mae import MaskedAutoencoder

_BATCH = 64


class FeatureStatistics(NamedTuple):
    """Statistics of the differences between the features of images."""

    effective_rank: float
    """Effective rank of the features, see `compute_effective_rank`."""
    variance: float
    """Mean over the features of their variance over images."""
    between_variance_ratio: float
    """Total variance over images divided by the mean squared norm; 0 if all features are equal."""
    mean_cosine: float
    """Mean cosine similarity of the features of two different images."""


def compute_effective_rank(features: Tensor) -> float:
    """Compute the effective rank of centered features (Roy and Vetterli 2007).

    It is the exponential of the entropy of the normalised singular values: D for features with identity
    covariance, 1 for features on a line, 0 for equal features, and nan if a feature is not finite.

    Args:
        features: float [N, D].
    """
    if not features.isfinite().all():
        return float("nan")
    values = torch.linalg.svdvals((features - features.mean(dim=0)).double())
    total = float(values.sum())
    if total <= 1e-9 * float(features.double().norm()) or total == 0:
        return 0.0
    probabilities = values / total
    return float(torch.special.entr(probabilities).sum().exp())


def compute_feature_statistics(features: Tensor) -> FeatureStatistics:
    """Compute the statistics of features float [N, D]."""
    features = features.double()
    variance = features.var(dim=0, correction=0)
    square = float(features.square().sum(dim=1).mean())
    unit = F.normalize(features, dim=1)
    count = len(unit)
    mean_cosine = (
        (float(unit.sum(dim=0).square().sum()) - count) / (count * (count - 1)) if count > 1 else 1.0
    )
    return FeatureStatistics(
        compute_effective_rank(features),
        float(variance.mean()),
        float(variance.sum()) / square if square else 0.0,
        mean_cosine,
    )


@torch.no_grad()
def compute_encoder_statistics(model: MaskedAutoencoder, images: Tensor) -> FeatureStatistics:
    """Compute the statistics of the mean patch tokens of unmasked images, float [N, C, H, W], normalised."""
    cls = model.config.cls_tokens
    features = [model.encode(batch)[:, cls:].float().mean(dim=1).cpu() for batch in images.split(_BATCH)]
    return compute_feature_statistics(torch.cat(features))


def compute_pixel_statistics(images: Tensor) -> FeatureStatistics:
    """Compute the statistics of the pixels of images, resized to at most 32 × 32, as a reference."""
    return compute_feature_statistics(compute_pixel_features(images.float().cpu()))
