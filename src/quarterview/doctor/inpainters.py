"""Trivial inpainters, judged as the model is: what hidden patches cost without any learning.

Each completes the picture from the visible patches. The model's own target is then made of the completed
picture and compared with that of the true one, so the losses stand in the same units as the model's,
whatever it predicts. Letters in shapes are those of `models/mae.py`, K = L - V hidden patches.
"""

import numpy as np
import torch
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.spatial import QhullError
from torch import Tensor

from quarterview.models import masking
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.masking import take

ZERO, MEAN, NEAREST, INTERPOLATED = "zero", "mean of visible", "nearest patch", "interpolation"
INPAINTERS = (ZERO, MEAN, NEAREST, INTERPOLATED)
"""From what knows nothing of the picture to what knows that pictures are smooth."""
_BATCH = 32


def mean_of_visible(patches: Tensor, visible: Tensor, hidden: Tensor, channels: int) -> Tensor:
    """The mean colour of what is visible, everywhere: float [B, K, P]."""
    colours = take(patches, visible).unflatten(2, (-1, channels)).mean(dim=(1, 2))  # [B, C]
    pixels = patches.shape[2] // channels
    return colours.repeat(1, pixels)[:, None].expand(-1, hidden.shape[1], -1)


def nearest_visible(patches: Tensor, visible: Tensor, hidden: Tensor, columns: int) -> Tensor:
    """A copy of the nearest visible patch, of the lowest index among equally near: float [B, K, P]."""
    places = [torch.stack([i // columns, i % columns], dim=2).float() for i in (hidden, visible)]
    squares = (places[0][:, :, None] - places[1][:, None]).square().sum(dim=3)  # [B, K, V], exact integers
    return take(patches, visible.gather(1, squares.argmin(dim=2)))


def interpolate(patches: Tensor, visible: Tensor, hidden: Tensor, columns: int, channels: int) -> Tensor:
    """Linear between the visible pixels around, on a Delaunay triangulation; nearest outside of them.

    A picture whose colours are linear in row and column comes back exactly wherever visible pixels
    surround the place. float32 [B, K, P] on the CPU.
    """
    side = round((patches.shape[2] // channels) ** 0.5)
    inside = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # [p * p, 2]
    # Pixels within a visible patch are in no triangle that reaches a hidden one: its border is enough.
    border = ((inside == 0) | (inside == side - 1)).any(dim=1)
    filled = []
    for some, seen, wanted in zip(patches.float().cpu(), visible.cpu(), hidden.cpu(), strict=True):
        corners = [torch.stack([i // columns, i % columns], dim=1) * side for i in (seen, wanted)]
        known = (corners[0][:, None] + inside[border]).flatten(0, 1)
        unknown = (corners[1][:, None] + inside).flatten(0, 1)
        colours = some[seen].unflatten(1, (-1, channels))[:, border].flatten(0, 1)
        values = _scattered(known.double().numpy(), colours.double().numpy(), unknown.double().numpy())
        filled.append(torch.from_numpy(values).float().view(len(wanted), -1))
    return torch.stack(filled)


def _scattered(points: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values [N, C] at points [N, 2] -> values at the wanted places [M, C]."""
    try:
        found = LinearNDInterpolator(points, values)(wanted)
    except QhullError:  # all points on one line, as with patches of one pixel
        found = np.full((len(wanted), values.shape[1]), np.nan)
    outside = np.isnan(found[:, 0])
    if outside.any():
        found[outside] = NearestNDInterpolator(points, values)(wanted[outside])
    return found


@torch.no_grad()
def inpainted_losses(model: MaskedAutoencoder, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The loss over hidden patches that each of `INPAINTERS` has on each image, in the model's target space.

    Patches that are normalised by their own deviation have no scale that an inpainter could know. Its
    predictions are therefore multiplied by the one factor in 0 … 1 that serves it best over all the
    images: it can only look better than it is.

    Args:
        model: says what the target is; its weights do not matter.
        images: float [B, C, H, W], normalised.
        mask: bool [B, L], True where hidden.

    Returns:
        float32 [B] on the CPU for each.
    """
    predictions: dict[str, list[Tensor]] = {name: [] for name in INPAINTERS}
    truths: list[Tensor] = []
    for some, hides in zip(images.split(_BATCH), mask.split(_BATCH), strict=True):
        patches = model.patchify(some)
        visible, hidden = masking.split(hides, int((~hides[0]).sum()))
        truths.append(model.target(some, patches, hidden).cpu())
        columns, channels = model.grid[1], some.shape[1]
        guesses = {
            MEAN: mean_of_visible(patches, visible, hidden, channels),
            NEAREST: nearest_visible(patches, visible, hidden, columns),
            INTERPOLATED: interpolate(patches, visible, hidden, columns, channels).to(patches),
        }
        index = hidden[:, :, None].expand(-1, -1, patches.shape[2])
        for name, guess in guesses.items():
            completed = patches.scatter(1, index, guess)
            predictions[name].append(model.target(model.unpatchify(completed), completed, hidden).cpu())
        predictions[ZERO].append(torch.zeros_like(truths[-1]))
    truth = torch.cat(truths)
    found = {name: torch.cat(parts) for name, parts in predictions.items()}
    if model.config.normalises_patches:
        found = {name: guess * best_factor(guess, truth) for name, guess in found.items()}
    return {name: model.target.loss(guess, truth).mean(dim=1) for name, guess in found.items()}


def best_factor(guess: Tensor, truth: Tensor) -> float:
    """The factor in 0 … 1 that makes a guess fit the truth best in the least squares."""
    square = float(guess.double().square().sum())
    return min(1.0, max(0.0, float((guess.double() * truth).sum()) / square)) if square > 0 else 0.0


@torch.no_grad()
def model_losses(model: MaskedAutoencoder, images: Tensor, mask: Tensor) -> Tensor:
    """The model's own loss over hidden patches on each image: float32 [B] on the CPU."""
    losses = []
    for some, hides in zip(images.split(_BATCH), mask.split(_BATCH), strict=True):
        out = model(some, mask=hides)
        with torch.autocast(some.device.type, enabled=False):
            truth = model.target(some, model.patchify(some), out.predicted)
            errors = model.target.loss(out.pred, truth)  # [B, Q]
            counted = hides.gather(1, out.predicted).float()  # not the visible ones of `predict_all`
            losses.append(((errors * counted).sum(dim=1) / counted.sum(dim=1)).cpu())
    return torch.cat(losses)
