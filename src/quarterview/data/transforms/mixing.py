"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch, on its device.

The samples 2i and 2i + 1 of a batch are mixed with each other. The random numbers of a pair depend only on
its first sample and epoch, so the result does not change if a batch is split between ranks or accumulation
steps.
"""

import functools

import torch
from scipy.special import betaincinv
from torch import Tensor

from quarterview import rng

_NUM_QUANTILES = 4096


@functools.cache
def _compute_beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """Compute the quantile function of Beta(alpha, alpha) at evenly spaced probabilities."""
    probabilities = torch.linspace(0, 1, _NUM_QUANTILES + 1, dtype=torch.float64).numpy()
    return torch.from_numpy(betaincinv(alpha, alpha, probabilities)).float().to(device)


def convert_uniform_to_beta(uniforms: Tensor, alpha: float) -> Tensor:
    """Convert uniform random numbers in [0, 1) to Beta(alpha, alpha), by a table of quantiles."""
    table = _compute_beta_quantiles(alpha, uniforms.device)
    index = uniforms * _NUM_QUANTILES
    low = index.long().clamp(max=_NUM_QUANTILES - 1)
    return torch.lerp(table[low], table[low + 1], index - low)


def mix_pairs(
    images: Tensor,
    targets: Tensor,
    epochs: Tensor,
    ids: Tensor,
    seed: int,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[Tensor, Tensor]:
    """Mix each pair of neighbours by mixup or CutMix; with equal probability if both are enabled.

    Args:
        images: float [B, C, H, W], B even.
        targets: float [B, num_classes], class probabilities.
        epochs, ids: int64 [B].
        mixup_alpha, cutmix_alpha: alpha of the Beta distribution; 0 disables.

    Returns:
        The mixed images and targets, of the same shapes. The targets of CutMix are weighted by the area of
        the box after clipping at the border.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    u = rng.uniform(seed, "mix", epochs[::2], ids[::2], 4)  # [B / 2, 4]
    switch, lam_u, row, column = u.unbind(1)
    cut = (
        switch < 0.5
        if mixup_alpha and cutmix_alpha
        else torch.full_like(switch, bool(cutmix_alpha), dtype=torch.bool)
    )
    height, width = images.shape[2:]
    weights = torch.ones(len(u), height, width, device=images.device)  # of the pixels of the sample itself
    if cutmix_alpha:
        weights = (
            ~_make_box_masks(convert_uniform_to_beta(lam_u, cutmix_alpha), row, column, height, width)
            * weights
        )
    if mixup_alpha:
        blend = convert_uniform_to_beta(lam_u, mixup_alpha)[:, None, None].expand_as(weights)
        weights = torch.where(cut[:, None, None], weights, blend)
    target_weights = weights.flatten(1).mean(1)[:, None, None]  # [B / 2, 1, 1]
    image_pairs, target_pairs = images.unflatten(0, (-1, 2)), targets.unflatten(0, (-1, 2))
    mixed_images = torch.lerp(image_pairs.flip(1), image_pairs, weights[:, None, None])
    mixed_targets = torch.lerp(target_pairs.flip(1), target_pairs, target_weights)
    return mixed_images.flatten(0, 1), mixed_targets.flatten(0, 1)


def _make_box_masks(lam: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Return masks of boxes of area 1 - lam around (row, column), clipped at the border: bool [N, H, W].

    Args:
        lam: float [N], area outside of the box as a fraction of the image, the λ of CutMix.
        row, column: float [N] in [0, 1), the center of the box.
    """
    side = (1 - lam).sqrt()

    def is_inside(center: Tensor, length: int) -> Tensor:
        middle, cut = (center * length).long(), (side * length).long()
        i = torch.arange(length, device=lam.device)
        return (i >= (middle - cut // 2)[:, None]) & (i < (middle + (cut + 1) // 2)[:, None])  # [N, length]

    return is_inside(row, height)[:, :, None] & is_inside(column, width)[:, None, :]
