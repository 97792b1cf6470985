"""Fixed two-dimensional sine-cosine position embeddings."""

import torch
from torch import Tensor


def get_2d_sincos_pos_embed(width: int, grid: tuple[int, int]) -> Tensor:
    """Return the position embeddings of the official MAE code (He et al. 2021, section A.1).

    The first half of the width encodes the column, the second half the row. Each half holds the sines, then
    the cosines, of the coordinate times ``10000 ** (-k / (width / 4))``.

    Args:
        width: the embedding dimension, a multiple of 4.
        grid: the numbers of rows and columns of patches.

    Returns:
        float32 [1, 1 + rows * columns, width]. Row 0 is for the cls token and is zero.

    Raises:
        ValueError: if `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(
            f"The width for 2-D sine-cosine position embeddings is {width}. Give a multiple of 4."
        )
    rows, columns = grid
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # [width / 4]

    def waves(coordinates: Tensor) -> Tensor:
        angles = coordinates.to(torch.float64)[:, None] * frequencies  # [L, width / 4]
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [L, width / 2]

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    table = torch.cat([waves(column.flatten()), waves(row.flatten())], dim=1)  # [L, width]
    return torch.cat([torch.zeros(1, width), table.to(torch.float32)])[None]
