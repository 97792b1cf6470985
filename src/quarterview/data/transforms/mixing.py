"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), keyed, a batch at a time on its device.

The samples at places 2i and 2i + 1 of a batch are mixed with one another. What happens to a pair
depends on its first sample and epoch alone, so batches cut into parts, or shared by ranks, mix alike.
"""

import functools

import torch
from scipy.special import betaincinv
from torch import Tensor

from quarterview import rng

_QUANTILES = 4096


@functools.cache
def _beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """The quantile function of Beta(alpha, alpha) at evenly spaced probabilities."""
    probabilities = torch.linspace(0, 1, _QUANTILES + 1, dtype=torch.float64).numpy()
    return torch.from_numpy(betaincinv(alpha, alpha, probabilities)).float().to(device)


def beta(uniforms: Tensor, alpha: float) -> Tensor:
    """Numbers distributed as Beta(alpha, alpha), from uniform ones."""
    table = _beta_quantiles(alpha, uniforms.device)
    place = uniforms * _QUANTILES
    low = place.long().clamp(max=_QUANTILES - 1)
    return torch.lerp(table[low], table[low + 1], place - low)


def mix(
    images: Tensor, targets: Tensor, epochs: Tensor, ids: Tensor, seed: int, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mix each pair of neighbours: half of the pairs by mixup and half by CutMix if both are on.

    Args:
        images: float [B, C, H, W], B even.
        targets: float [B, classes], a distribution a row.
        epochs, ids: int64 [B].
        mixup, cutmix: the alpha of each one's Beta distribution; 0 is off.

    Returns:
        The mixed images and targets, of the same shapes. CutMix weighs targets by the area that
        was really exchanged.
    """
    if not mixup and not cutmix:
        return images, targets
    u = rng.uniform(seed, "mix", epochs[::2], ids[::2], 4)  # [B / 2, 4]
    switch, share, row, column = u.unbind(1)
    cut = switch < 0.5 if mixup and cutmix else torch.full_like(switch, bool(cutmix), dtype=torch.bool)
    height, width = images.shape[2:]
    weights = torch.ones(len(u), height, width, device=images.device)  # of a sample's own pixels
    if cutmix:
        weights = ~_boxes(beta(share, cutmix), row, column, height, width) * weights
    if mixup:
        blend = beta(share, mixup)[:, None, None].expand_as(weights)
        weights = torch.where(cut[:, None, None], weights, blend)
    own = weights.flatten(1).mean(1)[:, None, None]  # [B / 2, 1, 1]
    pairs, paired = images.unflatten(0, (-1, 2)), targets.unflatten(0, (-1, 2))
    mixed = torch.lerp(pairs.flip(1), pairs, weights[:, None, None])
    return mixed.flatten(0, 1), torch.lerp(paired.flip(1), paired, own).flatten(0, 1)


def _boxes(share: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """bool [N, H, W]: boxes of area 1 - share around (row, column), cut off at the border."""
    side = (1 - share).sqrt()

    def inside(centre: Tensor, length: int) -> Tensor:
        middle, cut = (centre * length).long(), (side * length).long()
        at = torch.arange(length, device=share.device)
        return (at >= (middle - cut // 2)[:, None]) & (at < (middle + (cut + 1) // 2)[:, None])  # [N, length]

    return inside(row, height)[:, :, None] & inside(column, width)[:, None, :]
