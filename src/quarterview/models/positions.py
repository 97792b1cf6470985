"""Fixed two-dimensional sine-cosine position embeddings."""

import torch
from torch import Tensor


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """The position table of the official code (He et al. 2021, section A.1 and its repository).

    Half of the width encodes the column and the other half the row; each half is the sines, then
    the cosines, of the coordinate times ``10000 ** (-k / (width / 4))``.

    Args:
        width: of the embedding; must divide by 4.
        grid: rows and columns of patches.

    Returns:
        float32 [1, 1 + rows * columns, width]; row 0 belongs to the cls token and is all zeros.

    Raises:
        ValueError: if `width` does not divide by 4.
    """
    if width % 4:
        raise ValueError(
            f"a width of {width} cannot hold 2-D sine-cosine positions; accepted: multiples of 4"
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
