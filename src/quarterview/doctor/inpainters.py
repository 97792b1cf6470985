"""Trivial inpainters: baselines for the loss on masked patches that need no training.

Each inpainter completes an image from its visible patches. The targets of the completed image are compared
with those of the true image, so the losses are comparable with the model's for any target.

In shapes, B is the batch size, L the number of patches, V of them visible, K = L - V masked, and P the number
of values of a patch.
"""

import numpy as np
import torch
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.spatial import QhullError
from torch import Tensor

from quarterview.models import masking
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.masking import gather_patches

ZERO, MEAN, NEAREST, INTERPOLATED = "zero", "mean of visible", "nearest patch", "interpolation"
INPAINTERS = (ZERO, MEAN, NEAREST, INTERPOLATED)
"""All inpainters, from the weakest to the strongest assumption about images."""
_BATCH = 32


def inpaint_mean(patches: Tensor, visible_indices: Tensor, masked_indices: Tensor, in_chans: int) -> Tensor:
    """Fill masked patches with the mean color of the visible patches: float [B, K, P]."""
    colors = gather_patches(patches, visible_indices).unflatten(2, (-1, in_chans)).mean(dim=(1, 2))  # [B, C]
    pixels = patches.shape[2] // in_chans
    return colors.repeat(1, pixels)[:, None].expand(-1, masked_indices.shape[1], -1)


def inpaint_nearest(
    patches: Tensor, visible_indices: Tensor, masked_indices: Tensor, num_columns: int
) -> Tensor:
    """Fill masked patches with copies of the nearest visible patch: float [B, K, P].

    Among equally near patches, the one of the lowest index is copied.
    """
    masked, visible = (
        torch.stack([i // num_columns, i % num_columns], dim=2).float()
        for i in (masked_indices, visible_indices)
    )
    distances = (masked[:, :, None] - visible[:, None]).square().sum(dim=3)  # [B, K, V], exact integers
    return gather_patches(patches, visible_indices.gather(1, distances.argmin(dim=2)))


def inpaint_interpolated(
    patches: Tensor, visible_indices: Tensor, masked_indices: Tensor, num_columns: int, in_chans: int
) -> Tensor:
    """Fill masked patches by linear interpolation of visible pixels, on a Delaunay triangulation.

    Pixels outside the convex hull of the visible pixels are those of the nearest visible pixel. An image that
    is linear in row and column is reproduced exactly inside the convex hull.

    Returns:
        float32 [B, K, P] on the CPU.
    """
    side = round((patches.shape[2] // in_chans) ** 0.5)
    offsets = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # [p * p, 2]
    # No triangle of inner pixels of a visible patch reaches a masked patch, so the border pixels suffice.
    border = ((offsets == 0) | (offsets == side - 1)).any(dim=1)
    inpainted = []
    for image_patches, visible, masked in zip(
        patches.float().cpu(), visible_indices.cpu(), masked_indices.cpu(), strict=True
    ):
        corners = [torch.stack([i // num_columns, i % num_columns], dim=1) * side for i in (visible, masked)]
        known = (corners[0][:, None] + offsets[border]).flatten(0, 1)
        unknown = (corners[1][:, None] + offsets).flatten(0, 1)
        colors = image_patches[visible].unflatten(1, (-1, in_chans))[:, border].flatten(0, 1)
        values = _interpolate_scattered(
            known.double().numpy(), colors.double().numpy(), unknown.double().numpy()
        )
        inpainted.append(torch.from_numpy(values).float().view(len(masked), -1))
    return torch.stack(inpainted)


def _interpolate_scattered(points: np.ndarray, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Interpolate values [N, C] at points [N, 2] to positions [M, 2]. Returns values [M, C]."""
    try:
        results = LinearNDInterpolator(points, values)(positions)
    except QhullError:  # all points are on one line, which happens with patches of one pixel
        results = np.full((len(positions), values.shape[1]), np.nan)
    outside = np.isnan(results[:, 0])
    if outside.any():
        results[outside] = NearestNDInterpolator(points, values)(positions[outside])
    return results


@torch.no_grad()
def compute_inpainter_losses(model: MaskedAutoencoder, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Compute the loss on masked patches of each of `INPAINTERS` for each image, in the model's target space.

    With targets that are normalised per patch, an inpainter cannot know the scale of a patch. Its predictions
    are therefore multiplied by the factor in [0, 1] that minimises its loss over all images, which gives a
    lower bound of the loss.

    Args:
        model: defines the target. Its weights are not used.
        images: float [B, C, H, W], normalised.
        mask: bool [B, L], True for masked patches.

    Returns:
        float32 [B] on the CPU for each inpainter.
    """
    predictions: dict[str, list[Tensor]] = {name: [] for name in INPAINTERS}
    targets: list[Tensor] = []
    for image_batch, mask_batch in zip(images.split(_BATCH), mask.split(_BATCH), strict=True):
        patches = model.patchify(image_batch)
        visible, masked = masking.split_indices(mask_batch, int((~mask_batch[0]).sum()))
        targets.append(model.target(image_batch, patches, masked).cpu())
        num_columns, in_chans = model.grid[1], image_batch.shape[1]
        inpainted = {
            MEAN: inpaint_mean(patches, visible, masked, in_chans),
            NEAREST: inpaint_nearest(patches, visible, masked, num_columns),
            INTERPOLATED: inpaint_interpolated(patches, visible, masked, num_columns, in_chans).to(patches),
        }
        index = masked[:, :, None].expand(-1, -1, patches.shape[2])
        for name, masked_patches in inpainted.items():
            completed = patches.scatter(1, index, masked_patches)
            predictions[name].append(model.target(model.unpatchify(completed), completed, masked).cpu())
        predictions[ZERO].append(torch.zeros_like(targets[-1]))
    target = torch.cat(targets)
    preds = {name: torch.cat(batches) for name, batches in predictions.items()}
    if model.config.normalizes_patches:
        preds = {name: pred * compute_best_scale(pred, target) for name, pred in preds.items()}
    return {name: model.target.loss(pred, target).mean(dim=1) for name, pred in preds.items()}


def compute_best_scale(pred: Tensor, target: Tensor) -> float:
    """Return the factor in [0, 1] for `pred` that minimises the squared error to `target`."""
    square = float(pred.double().square().sum())
    return min(1.0, max(0.0, float((pred.double() * target).sum()) / square)) if square > 0 else 0.0


@torch.no_grad()
def compute_model_losses(model: MaskedAutoencoder, images: Tensor, mask: Tensor) -> Tensor:
    """Compute the model's loss on masked patches for each image: float32 [B] on the CPU."""
    losses = []
    for image_batch, mask_batch in zip(images.split(_BATCH), mask.split(_BATCH), strict=True):
        out = model(image_batch, mask=mask_batch)
        with torch.autocast(image_batch.device.type, enabled=False):
            target = model.target(image_batch, model.patchify(image_batch), out.pred_indices)
            patch_losses = model.target.loss(out.pred, target)  # [B, Q] for Q predicted patches
            weights = mask_batch.gather(1, out.pred_indices).float()  # 0 for visible patches (`predict_all`)
            losses.append(((patch_losses * weights).sum(dim=1) / weights.sum(dim=1)).cpu())
    return torch.cat(losses)
