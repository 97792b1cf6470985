"""Which patches are hidden.

Every kind of mask is expressed as one *noise* value per patch, of which the lowest are kept. That
is how the official code draws its random masks; block and grid masks become orders of preference.
So every row keeps exactly ``keep_count`` patches, whatever the kind, and batches stay rectangular.
Among the hidden patches the order is random, whatever the kind: the first of them are a random part.

The uniform numbers come from the caller, who knows what they should depend on.
"""

import math

import torch
from torch import Tensor

from quarterview.models.config import MaskKind, keep_count

BLOCK_MIN_PATCHES = 4
BLOCK_MIN_ASPECT = 0.3
_BLOCK_PROPOSALS = (
    60  # these hide 99% of what is wanted at ratios up to 0.75, and 88% at 0.9 of 24×24 patches
)
_DRAWS_PER_PROPOSAL = 4


def uniforms_needed(kind: MaskKind, patches: int) -> int:
    """How many uniform numbers a sample's mask takes."""
    return 2 * patches + _BLOCK_PROPOSALS * _DRAWS_PER_PROPOSAL if kind == "block" else patches


def mask_noise(
    kind: MaskKind, uniforms: Tensor, grid: tuple[int, int], mask_ratio: float, unit: int = 1
) -> Tensor:
    """Turn uniform numbers into noise, lowest kept.

    Args:
        kind: ``"random"``, ``"block"`` or ``"grid"`` (He et al. 2021, table 1f).
        uniforms: float [B, uniforms_needed(kind, L)] in [0, 1).
        grid: rows and columns of patches; L = rows * columns.
        mask_ratio: the share of patches to hide.
        unit: of random masks, the side in patches of squares that are hidden or shown as one; the last square
            that is shown may be shown in part.

    Returns:
        float [B, L].
    """
    patches = grid[0] * grid[1]
    if kind == "random" and unit == 1:
        return uniforms[:, :patches]
    kept = keep_count(patches, mask_ratio)
    if kind == "random":
        squares = uniforms.unflatten(1, grid)[:, ::unit, ::unit]  # [B, rows / unit, columns / unit]
        noise = squares.repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1)
        return mask_from_noise(noise, kept) + 0.5 * uniforms
    if kind == "grid":
        hidden = grid_order(grid).to(uniforms) >= kept
        return hidden + 0.5 * uniforms
    blocks = _block_mask(uniforms[:, patches:-patches], grid, patches - kept)
    # The blocks never exceed the count but may fall short of it: the rest is drawn at random.
    hidden = mask_from_noise(blocks + 0.5 * uniforms[:, :patches], kept)
    return hidden + 0.5 * uniforms[:, -patches:]


def mask_from_noise(noise: Tensor, kept: int) -> Tensor:
    """bool [B, L], True where hidden: all but the `kept` patches of lowest noise in each row."""
    order = noise.argsort(dim=1, stable=True)
    hidden = torch.ones(noise.shape, dtype=torch.bool, device=noise.device)
    return hidden.scatter(1, order[:, :kept], False)


def count_visible(mask: Tensor, shape: tuple[int, int]) -> int:
    """How many patches a caller's mask leaves visible in every row.

    Args:
        mask: bool, True where hidden.
        shape: [B, L] that it must have.

    Raises:
        ValueError: if it has another shape or type, or its rows differ, or one leaves nothing.
    """
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask of {mask.dtype} {tuple(mask.shape)}; accepted: torch.bool {shape}, True where hidden"
        )
    counts = (~mask).sum(dim=1).unique().tolist()
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(
            f"mask rows that leave {counts} patches visible; accepted: one count above 0 in all rows"
        )
    return counts[0]


def rows_of(noise: Tensor, shape: tuple[int, int]) -> Tensor:
    """A caller's noise as one row for each mask: float [N, L], the masks of an image one after another.

    Args:
        noise: float [B, L], or [B, k, L] for k masks of each image.
        shape: [B, L].

    Raises:
        ValueError: if it has another shape.
    """
    if noise.ndim not in (2, 3) or (noise.shape[0], noise.shape[-1]) != shape or not noise.numel():
        raise ValueError(
            f"noise of shape {tuple(noise.shape)}; accepted: {shape}, or ({shape[0]}, k, {shape[1]}) for k "
            "masks of each image"
        )
    return noise.reshape(-1, shape[1])


def split(mask: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The patch indices of the visible and of the hidden patches, each ascending.

    Args:
        mask: bool [B, L], True where hidden, `kept` False a row.

    Returns:
        int64 [B, kept] and int64 [B, L - kept].
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :kept], order[:, kept:]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [N, K] of x [B, L, D]: [N, K, D]; or, of x [B, L], numbers [N, K].

    N is a multiple of B: each image in x serves N / B lists of rows, which follow one another. So an
    image with several masks is held once.
    """
    if len(x) == 1:
        return x[0][index]
    if x.ndim == 2:
        return x.gather(1, index.reshape(len(x), -1)).view(index.shape)
    rows = index.reshape(len(x), -1, 1).expand(-1, -1, x.shape[2])  # [B, N / B * K, D]
    return x.gather(1, rows).view(*index.shape, x.shape[2])


def lowest(hidden: Tensor, noise: Tensor, share: float) -> Tensor:
    """The share of the hidden patches that has the lowest noise, at least one of them.

    Args:
        hidden: int64 [B, K], ascending patch indices.
        noise: float [B, L].
        share: above 0, up to 1.

    Returns:
        int64 [B, max(1, round(share * K))], ascending.
    """
    count = max(1, round(share * hidden.shape[1]))
    order = noise.gather(1, hidden).argsort(dim=1, stable=True)
    return hidden.gather(1, order[:, :count].sort(dim=1).values)


def grid_order(grid: tuple[int, int]) -> Tensor:
    """The rank of each patch in an ordered (Bayer) dithering of the grid.

    Keeping the patches of lowest rank keeps a lattice as regular as the count allows: the first
    quarter of an even grid is one patch of each 2×2.

    Returns:
        float32 [L], a permutation of 0 … L-1.
    """
    rows, columns = grid
    bits = max(1, (max(rows, columns) - 1).bit_length())
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    level = torch.zeros(rows, columns, dtype=torch.int64)
    for bit in range(bits):  # the lowest bits of the coordinates are the highest digits of the level
        r, c = (row >> bit) & 1, (column >> bit) & 1
        level = level * 4 + (2 * (r ^ c) + r)
    return level.flatten().argsort(stable=True).argsort().to(torch.float32)


def _block_mask(uniforms: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """BEiT's block-wise mask (Bao et al. 2021, algorithm 1), a batch at a time.

    Rectangles of at least four patches and an aspect ratio between 0.3 and 1 / 0.3 are proposed
    one after another; one is taken if it hides something new and not more than is still wanted.

    Args:
        uniforms: float [B, proposals * 4].

    Returns:
        bool [B, L], at most `count` True a row.
    """
    rows, columns = grid
    row = torch.arange(rows, device=uniforms.device)[None, :, None]
    column = torch.arange(columns, device=uniforms.device)[None, None, :]
    hidden = torch.zeros(len(uniforms), rows, columns, dtype=torch.bool, device=uniforms.device)
    log_aspect = math.log(BLOCK_MIN_ASPECT)
    for draw in uniforms.split(_DRAWS_PER_PROPOSAL, dim=1):
        wanted = count - hidden.sum((1, 2))  # [B]
        area = BLOCK_MIN_PATCHES + draw[:, 0] * (wanted - BLOCK_MIN_PATCHES).clamp(min=0)
        aspect = (log_aspect * (2 * draw[:, 1] - 1)).exp()
        height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top = (draw[:, 2] * (rows - height + 1)).long()
        left = (draw[:, 3] * (columns - width + 1)).long()
        inside_rows = (row >= top[:, None, None]) & (row < (top + height)[:, None, None])
        inside_columns = (column >= left[:, None, None]) & (column < (left + width)[:, None, None])
        block = inside_rows & inside_columns  # [B, rows, columns]
        new = (block & ~hidden).sum((1, 2))
        taken = (height <= rows) & (width <= columns) & (new > 0) & (new <= wanted)
        hidden |= block & taken[:, None, None]
    return hidden.flatten(1)
