"""Masks: random, block-wise and grid-wise (He et al. 2021, section 4.1 and table 1f).

A mask is made from one *noise* value per patch: the patches of lowest noise stay visible, and the others are
masked. The official code makes its random masks in this way. For block and grid masks the noise of a masked
patch is above that of every visible patch. So every row has exactly ``compute_num_visible`` visible patches,
whatever the kind of mask. Within the masked patches the order of the noise is always random, so the first of
them are a random subset.

The caller draws the uniform random numbers and so decides which seed, epoch and sample they belong to.
"""

import math

import torch
from torch import Tensor

from quarterview.models.config import MaskKind, compute_num_visible

MIN_BLOCK_PATCHES = 4
MIN_BLOCK_ASPECT = 0.3
# 60 rectangles mask 99% of the required patches at ratios up to 0.75, and 88% at ratio 0.9 of 24×24 patches.
# The rest is masked at random.
_NUM_BLOCK_PROPOSALS = 60
_DRAWS_PER_PROPOSAL = 4


def count_mask_uniforms(kind: MaskKind, num_patches: int) -> int:
    """Return the number of uniform random numbers that `mask_noise` needs per sample."""
    return 2 * num_patches + _NUM_BLOCK_PROPOSALS * _DRAWS_PER_PROPOSAL if kind == "block" else num_patches


def mask_noise(
    kind: MaskKind, uniforms: Tensor, grid: tuple[int, int], mask_ratio: float, mask_unit: int = 1
) -> Tensor:
    """Turn uniform random numbers into the noise of a mask.

    Args:
        kind: ``"random"``, ``"block"`` or ``"grid"`` (He et al. 2021, table 1f).
        uniforms: float [B, count_mask_uniforms(kind, L)] in [0, 1).
        grid: the numbers of rows and columns of patches; L = rows * columns.
        mask_ratio: the fraction of the patches to mask.
        mask_unit: for random masks, the side in patches of the squares that are masked as a whole. One square
            may be masked in part, so that the number of visible patches is exact.

    Returns:
        float [B, L]. The patches of lowest noise stay visible.
    """
    num_patches = grid[0] * grid[1]
    if kind == "random" and mask_unit == 1:
        return uniforms[:, :num_patches]
    num_visible = compute_num_visible(num_patches, mask_ratio)
    # Below, a mask (0 or 1) plus half a uniform number: visible patches come first, in random order.
    if kind == "random":
        squares = uniforms.unflatten(1, grid)[:, ::mask_unit, ::mask_unit]  # [B, rows / unit, columns / unit]
        noise = squares.repeat_interleave(mask_unit, 1).repeat_interleave(mask_unit, 2).flatten(1)
        return mask_from_noise(noise, num_visible) + 0.5 * uniforms
    if kind == "grid":
        mask = compute_bayer_order(grid).to(uniforms) >= num_visible
        return mask + 0.5 * uniforms
    blocks = _make_block_mask(uniforms[:, num_patches:-num_patches], grid, num_patches - num_visible)
    # The blocks never mask too many patches, but they may mask too few: the rest is chosen at random.
    mask = mask_from_noise(blocks + 0.5 * uniforms[:, :num_patches], num_visible)
    return mask + 0.5 * uniforms[:, -num_patches:]


def mask_from_noise(noise: Tensor, num_visible: int) -> Tensor:
    """Return the mask that leaves the patches of lowest noise visible.

    Args:
        noise: float [N, L].
        num_visible: the number of visible patches in each row.

    Returns:
        bool [N, L], True where masked.
    """
    order = noise.argsort(dim=1, stable=True)
    mask = torch.ones(noise.shape, dtype=torch.bool, device=noise.device)
    return mask.scatter(1, order[:, :num_visible], False)


def count_visible(mask: Tensor, shape: tuple[int, int]) -> int:
    """Check a caller's mask, and return the number of visible patches per row.

    Args:
        mask: bool, True where masked.
        shape: the required shape, [B, L].

    Raises:
        ValueError: if the mask has the wrong shape or dtype, or its rows have different numbers of visible
            patches, or none.
    """
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"The mask is {mask.dtype} of shape {tuple(mask.shape)}. "
            f"Give torch.bool of shape {shape}, True where masked."
        )
    counts = (~mask).sum(dim=1).unique().tolist()
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(
            f"The rows of the mask leave {counts} patches visible. "
            "Give a mask that leaves the same number of patches, at least 1, visible in every row."
        )
    return counts[0]


def flatten_noise(noise: Tensor, shape: tuple[int, int]) -> Tensor:
    """Check a caller's noise, and return it with one row per mask: float [N, L].

    The masks of an image are in adjacent rows.

    Args:
        noise: float [B, L], or [B, k, L] for k masks per image.
        shape: the required B and L.

    Raises:
        ValueError: if the noise has the wrong shape.
    """
    if noise.ndim not in (2, 3) or (noise.shape[0], noise.shape[-1]) != shape or not noise.numel():
        raise ValueError(
            f"The noise has shape {tuple(noise.shape)}. "
            f"Give shape {shape}, or ({shape[0]}, k, {shape[1]}) for k masks per image."
        )
    return noise.reshape(-1, shape[1])


def split_indices(mask: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the visible patches and those of the masked patches, both ascending.

    Args:
        mask: bool [N, L], True where masked, with `num_visible` visible patches in every row.

    Returns:
        int64 [N, num_visible] and int64 [N, L - num_visible].
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :num_visible], order[:, num_visible:]


def gather_patches(x: Tensor, index: Tensor) -> Tensor:
    """Select patches by index.

    N is a multiple of B: with several masks per image, adjacent rows of `index` select from the same image,
    so the image need not be repeated in memory.

    Args:
        x: [B, L, D], or [B, L].
        index: int64 [N, K], indices of patches.

    Returns:
        [N, K, D], or [N, K].
    """
    if len(x) == 1:
        return x[0][index]
    if x.ndim == 2:
        return x.gather(1, index.reshape(len(x), -1)).view(index.shape)
    rows = index.reshape(len(x), -1, 1).expand(-1, -1, x.shape[2])  # [B, N / B * K, D]
    return x.gather(1, rows).view(*index.shape, x.shape[2])


def select_lowest_noise(masked_indices: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """Select the part of the masked patches that has the lowest noise, at least one patch.

    Args:
        masked_indices: int64 [N, M], ascending.
        noise: float [N, L].
        ratio: the fraction of the masked patches to select, above 0, at most 1.

    Returns:
        int64 [N, max(1, round(ratio * M))], ascending.
    """
    count = max(1, round(ratio * masked_indices.shape[1]))
    order = noise.gather(1, masked_indices).argsort(dim=1, stable=True)
    return masked_indices.gather(1, order[:, :count].sort(dim=1).values)


def compute_bayer_order(grid: tuple[int, int]) -> Tensor:
    """Return the position of each patch in the order of a Bayer matrix (ordered dithering) of the grid.

    The patches of lowest position form a lattice that is as regular as their number allows: the first quarter
    of a grid with even sides is one patch of each 2×2 square, as in the paper's grid-wise masks.

    Returns:
        float32 [L], a permutation of 0 to L-1.
    """
    rows, columns = grid
    bits = max(1, (max(rows, columns) - 1).bit_length())
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    level = torch.zeros(rows, columns, dtype=torch.int64)
    for bit in range(bits):  # the lowest bits of the coordinates become the highest digits of the level
        r, c = (row >> bit) & 1, (column >> bit) & 1
        level = level * 4 + (2 * (r ^ c) + r)
    return level.flatten().argsort(stable=True).argsort().to(torch.float32)


def _make_block_mask(uniforms: Tensor, grid: tuple[int, int], num_masked: int) -> Tensor:
    """Make BEiT's block-wise masks (Bao et al. 2021, algorithm 1) for a whole batch.

    Rectangles of at least 4 patches, with an aspect ratio between 0.3 and 1 / 0.3, are proposed one after
    another. A rectangle is accepted if it masks at least one new patch and no more than are still missing.

    Args:
        uniforms: float [B, proposals * 4] in [0, 1).
        grid: the numbers of rows and columns of patches.
        num_masked: the number of patches to mask in each row.

    Returns:
        bool [B, L], with at most `num_masked` True in each row.
    """
    rows, columns = grid
    row = torch.arange(rows, device=uniforms.device)[None, :, None]
    column = torch.arange(columns, device=uniforms.device)[None, None, :]
    mask = torch.zeros(len(uniforms), rows, columns, dtype=torch.bool, device=uniforms.device)
    log_aspect = math.log(MIN_BLOCK_ASPECT)
    for draw in uniforms.split(_DRAWS_PER_PROPOSAL, dim=1):
        missing = num_masked - mask.sum((1, 2))  # [B]
        area = MIN_BLOCK_PATCHES + draw[:, 0] * (missing - MIN_BLOCK_PATCHES).clamp(min=0)
        aspect = (log_aspect * (2 * draw[:, 1] - 1)).exp()
        height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top = (draw[:, 2] * (rows - height + 1)).long()
        left = (draw[:, 3] * (columns - width + 1)).long()
        inside_rows = (row >= top[:, None, None]) & (row < (top + height)[:, None, None])
        inside_columns = (column >= left[:, None, None]) & (column < (left + width)[:, None, None])
        block = inside_rows & inside_columns  # [B, rows, columns]
        new = (block & ~mask).sum((1, 2))
        accepted = (height <= rows) & (width <= columns) & (new > 0) & (new <= missing)
        mask |= block & accepted[:, None, None]
    return mask.flatten(1)
