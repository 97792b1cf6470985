import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quarterview.models.positions import get_2d_sincos_pos_embed


def by_hand(width: int, row: int, column: int) -> list[float]:
    """One row of the official table: the column in the first half, the row in the second."""
    quarter = width // 4
    frequencies = [10000 ** (-k / quarter) for k in range(quarter)]
    halves = [[f(x * w) for f in (math.sin, math.cos) for w in frequencies] for x in (column, row)]
    return halves[0] + halves[1]


@given(st.integers(1, 24).map(lambda n: 4 * n), st.integers(1, 9), st.integers(1, 9))
def test_every_row_is_the_closed_form(width, rows, columns):
    table = get_2d_sincos_pos_embed(width, (rows, columns))
    assert table.dtype == torch.float32
    assert table.shape == (1, 1 + rows * columns, width)
    assert torch.equal(table[0, 0], torch.zeros(width))
    expected = [by_hand(width, i, j) for i in range(rows) for j in range(columns)]
    torch.testing.assert_close(table[0, 1:], torch.tensor(expected), rtol=0, atol=1e-6)


def test_hand_values_of_the_neighbours_of_the_origin():
    table = get_2d_sincos_pos_embed(8, (2, 3))[0]
    s, c, s_slow, c_slow = math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)
    at_column_1 = [s, s_slow, c, c_slow, 0, 0, 1, 1]
    at_row_1 = [0, 0, 1, 1, s, s_slow, c, c_slow]
    torch.testing.assert_close(table[1 + 1], torch.tensor(at_column_1))
    torch.testing.assert_close(table[1 + 3], torch.tensor(at_row_1))


def test_the_table_equals_transformers():
    modeling = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    if not hasattr(modeling, "build_2d_sinusoidal_position_embedding"):
        pytest.skip("this transformers has no such function")
    theirs = modeling.build_2d_sinusoidal_position_embedding(14, 14, embed_dim=192, cls_token=True)
    row_half, column_half = theirs.chunk(2, dim=1)
    torch.testing.assert_close(
        get_2d_sincos_pos_embed(192, (14, 14))[0],
        torch.cat([column_half, row_half], dim=1),
        rtol=0,
        atol=1e-6,
    )


def test_all_positions_are_different():
    table = get_2d_sincos_pos_embed(64, (16, 16))[0]
    assert float(torch.cdist(table[1:], table[1:]).fill_diagonal_(9).min()) > 0.5


@pytest.mark.parametrize("width", [1, 2, 6, 70])
def test_a_width_that_is_not_a_multiple_of_4_is_an_error(width):
    with pytest.raises(ValueError, match=f"is {width}\\. Give a multiple of 4"):
        get_2d_sincos_pos_embed(width, (2, 2))
