import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quarterview.models import masking

KINDS = ("random", "block", "grid")
GRIDS = st.tuples(st.integers(1, 16), st.integers(1, 16)).filter(lambda grid: grid[0] * grid[1] > 1)
RATIOS = st.floats(0.01, 0.99)


def uniforms(kind: masking.MaskKind, grid: tuple[int, int], rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, masking.count_mask_uniforms(kind, grid[0] * grid[1]), generator=generator)


def masks(kind: masking.MaskKind, grid: tuple[int, int], ratio: float, rows: int, seed: int = 0):
    """Masks, bool [rows, L], made as the model makes them."""
    noise = masking.mask_noise(kind, uniforms(kind, grid, rows, seed), grid, ratio)
    return masking.mask_from_noise(noise, masking.compute_num_visible(grid[0] * grid[1], ratio))


# ---------------------------------------------------------------------- number of visible patches


@pytest.mark.parametrize(
    ("ratio", "num_visible"),
    [
        (0.1, 57),
        (0.2, 51),
        (0.3, 44),
        (0.4, 38),
        (0.5, 32),
        (0.6, 25),
        (0.7, 19),
        (0.75, 16),
        (0.8, 12),
        (0.9, 6),
    ],
)
def test_counts_of_64_patches(ratio, num_visible):
    assert masking.compute_num_visible(64, ratio) == num_visible


@pytest.mark.parametrize(
    ("patches", "ratio", "num_visible"), [(196, 0.75, 49), (100, 0.9, 9), (256, 0.75, 64)]
)
def test_counts_of_other_grids(patches, ratio, num_visible):
    assert masking.compute_num_visible(patches, ratio) == num_visible


@pytest.mark.parametrize(
    ("patches", "ratio"), [(10, 0.9), (4, 0.8), (64, 1.0), (64, 0.0), (1, 0.5), (64, -0.5), (64, 1.5)]
)
def test_no_visible_patch_or_all_visible_is_an_error(patches, ratio):
    with pytest.raises(ValueError, match=rf"mask ratio of {ratio} leaves -?\d+ of {patches} patches visible"):
        masking.compute_num_visible(patches, ratio)


@given(st.sampled_from(KINDS), GRIDS, RATIOS, st.integers(0, 99))
def test_every_row_keeps_exactly_the_official_count(kind, grid, ratio, seed):
    patches = grid[0] * grid[1]
    num_visible = int(patches * (1 - ratio))
    if not 0 < num_visible < patches:
        with pytest.raises(ValueError, match="Give a ratio"):
            masks(kind, grid, ratio, rows=3, seed=seed)
        return
    mask = masks(kind, grid, ratio, rows=3, seed=seed)
    assert mask.dtype == torch.bool
    assert mask.shape == (3, patches)
    assert (~mask).sum(dim=1).tolist() == [num_visible] * 3


# ---------------------------------------------------------------------- from noise


@given(st.integers(2, 200), st.data())
def test_masks_from_noise_equal_the_official_codes(patches, data):
    num_visible = data.draw(st.integers(1, patches - 1))
    noise = torch.rand(4, patches, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    official = torch.ones(4, patches)
    official[:, :num_visible] = 0
    official = official.gather(1, restore)  # 1 = removed, in image order
    assert torch.equal(masking.mask_from_noise(noise, num_visible), official.bool())


@pytest.mark.parametrize("num_visible", [1, 5, 11])
def test_equal_noise_still_keeps_the_count(num_visible):
    assert (~masking.mask_from_noise(torch.zeros(2, 12), num_visible)).sum(dim=1).tolist() == [
        num_visible,
        num_visible,
    ]


@given(st.integers(2, 60), st.data())
def test_split_indices_are_ascending(patches, data):
    num_visible = data.draw(st.integers(1, patches - 1))
    noise = torch.rand(3, patches, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    mask = masking.mask_from_noise(noise, num_visible)
    visible, masked = masking.split_indices(mask, num_visible)
    for row in range(3):
        assert visible[row].tolist() == [i for i in range(patches) if not mask[row, i]]
        assert masked[row].tolist() == [i for i in range(patches) if mask[row, i]]


# ---------------------------------------------------------------------- random


def test_random_masks_mask_every_patch_equally_often_and_independently():
    mask = masks("random", (8, 8), 0.75, rows=8000).float()
    assert float((mask.mean(dim=0) - 0.75).abs().max()) < 5 * (0.75 * 0.25 / 8000) ** 0.5
    correlations = torch.corrcoef(mask.T) - torch.eye(64)
    assert abs(float(correlations.sum() / (64 * 63)) + 1 / 63) < 1e-3  # exchangeable: -1/(L-1) each
    assert float((correlations + (1 - torch.eye(64)) / 63).abs().max()) < 0.06


# ---------------------------------------------------------------------- grid


@given(st.integers(1, 12), st.integers(1, 12))
def test_three_quarters_of_an_even_grid_keeps_one_of_each_2_by_2(half_rows, half_columns):
    grid = (2 * half_rows, 2 * half_columns)
    visible = ~masks("grid", grid, 0.75, rows=1)[0].view(grid)
    cells = visible.view(half_rows, 2, half_columns, 2).sum(dim=(1, 3))
    assert torch.equal(cells, torch.ones_like(cells))


def test_half_of_an_even_grid_is_a_checkerboard_and_a_sixteenth_keeps_one_of_each_4_by_4():
    half = ~masks("grid", (8, 12), 0.5, rows=1)[0].view(8, 12)
    assert torch.equal(half[:, 1:], ~half[:, :-1])
    assert torch.equal(half[1:], ~half[:-1])
    sixteenth = ~masks("grid", (8, 12), 15 / 16, rows=1)[0].view(2, 4, 3, 4)
    assert sixteenth.sum(dim=(1, 3)).tolist() == [[1, 1, 1], [1, 1, 1]]


@given(GRIDS, RATIOS, RATIOS)
def test_patches_visible_at_a_ratio_are_visible_at_lower_ratios(grid, one, other):
    patches = grid[0] * grid[1]
    low, high = sorted((one, other))
    if int(patches * (1 - high)) < 1 or int(patches * (1 - low)) >= patches:
        return
    kept_by_low, kept_by_high = (~masks("grid", grid, ratio, rows=1)[0] for ratio in (low, high))
    assert bool((kept_by_low | ~kept_by_high).all())


@given(GRIDS)
def test_the_bayer_order_is_a_permutation(grid):
    patches = grid[0] * grid[1]
    assert masking.compute_bayer_order(grid).sort().values.tolist() == list(range(patches))


def test_grid_masks_are_the_same_for_every_image():
    mask = masks("grid", (6, 6), 0.75, rows=5)
    assert torch.equal(mask, mask[:1].expand_as(mask))


# ---------------------------------------------------------------------- block


def slow_blocks(rows: int, columns: int, num_masked: int, rng: random.Random) -> set[tuple[int, int]]:
    """Make BEiT's mask (Bao et al. 2021, algorithm 1) for one image, one patch at a time.

    It may stop short of `num_masked`, after ten rectangles in a row that did not fit.
    """
    masked: set[tuple[int, int]] = set()
    failures = 0
    while len(masked) < num_masked and failures < 10:
        failures += 1
        area = rng.uniform(4, max(4, num_masked - len(masked)))
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height > rows or width > columns:
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        block = {(top + i, left + j) for i in range(height) for j in range(width)}
        if 0 < len(block - masked) <= num_masked - len(masked):
            masked |= block
            failures = 0
    return masked


def edges(mask: torch.Tensor, grid: tuple[int, int]) -> float:
    """The mean number of pairs of neighbours of which exactly one is masked."""
    mask_images = mask.view(-1, *grid)
    across = (mask_images[:, :, 1:] ^ mask_images[:, :, :-1]).flatten(1).sum(dim=1)
    down = (mask_images[:, 1:] ^ mask_images[:, :-1]).flatten(1).sum(dim=1)
    return float((across + down).double().mean())


def slow_masks(grid: tuple[int, int], num_masked: int, rows: int) -> torch.Tensor:
    """Masks, bool [rows, L], made by `slow_blocks` and filled up at random."""
    rng = random.Random(0)
    mask = torch.zeros(rows, *grid, dtype=torch.bool)
    for row in range(rows):
        masked = slow_blocks(*grid, num_masked, rng)
        others = [(i, j) for i in range(grid[0]) for j in range(grid[1]) if (i, j) not in masked]
        for i, j in [*masked, *rng.sample(others, num_masked - len(masked))]:
            mask[row, i, j] = True
    return mask.flatten(1)


@pytest.mark.parametrize(
    ("grid", "ratio"), [((14, 14), 0.75), ((14, 14), 0.5), ((8, 8), 0.75), ((8, 8), 0.5)]
)
def test_block_masks_have_the_statistics_of_beits(grid, ratio):
    num_masked = grid[0] * grid[1] - masking.compute_num_visible(grid[0] * grid[1], ratio)
    fast = masks("block", grid, ratio, rows=1500)
    slow = slow_masks(grid, num_masked, rows=1500)
    scattered = edges(masks("random", grid, ratio, rows=300), grid)
    assert edges(fast, grid) < 0.6 * scattered
    assert edges(fast, grid) == pytest.approx(edges(slow, grid), rel=0.05)
    # positions: each patch is masked equally often in both
    difference = fast.float().mean(dim=0) - slow.float().mean(dim=0)
    assert float(difference.abs().max()) < 5 * (2 * 0.25 / 1500) ** 0.5
    # correlations of neighbours, and of patches in opposite corners
    for i, j in [(0, 1), (0, grid[1]), (0, grid[0] * grid[1] - 1)]:
        both = [float((m[:, i] == m[:, j]).float().mean()) for m in (fast, slow)]
        assert both[0] == pytest.approx(both[1], abs=0.06)


def test_a_small_block_mask_is_one_rectangle():
    """The smallest block has 4 patches, so 4 masked patches are 2×2, 1×4 or 4×1, or, because of rounding, 1×3
    or 3×1 and one more."""
    shapes = [(2, 2), (1, 3), (3, 1)]
    for mask_image in masks("block", (8, 8), 4 / 64, rows=200).view(-1, 8, 8):
        assert int(mask_image.sum()) == 4
        assert any(
            bool(mask_image.unfold(0, height, 1).unfold(1, width, 1).flatten(2).all(dim=2).any())
            for height, width in shapes
        )


def test_block_masks_differ_from_image_to_image():
    mask = masks("block", (8, 8), 0.5, rows=50)
    assert len(mask.unique(dim=0)) == 50


# ---------------------------------------------------------------------- mask units


@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.sampled_from([0.25, 0.5, 0.75]))
def test_units_are_masked_as_a_whole(seed, unit, ratio):
    grid = (8, 12)
    u = torch.rand(6, 96, generator=torch.Generator().manual_seed(seed))
    noise = masking.mask_noise("random", u, grid, ratio, unit)
    num_visible = masking.compute_num_visible(96, ratio)
    mask = masking.mask_from_noise(noise, num_visible)
    assert (~mask).sum(1).tolist() == [num_visible] * 6
    squares = mask.view(6, 8 // unit, unit, 12 // unit, unit).float().mean((2, 4))
    cut = ((squares > 0) & (squares < 1)).flatten(1).sum(1)
    assert cut.tolist() == [0 if num_visible % unit**2 == 0 else 1] * 6
    assert len({tuple(row) for row in mask.tolist()}) > 1


def test_units_of_one_are_random_masks():
    u = torch.rand(3, 96)
    assert torch.equal(masking.mask_noise("random", u, (8, 12), 0.75), u)


def test_units_are_masked_equally_often():
    u = torch.rand(20_000, 64, generator=torch.Generator().manual_seed(0))
    mask = masking.mask_from_noise(masking.mask_noise("random", u, (8, 8), 0.75, 2), 16)
    assert (mask.float().mean(0) - 0.75).abs().max() < 0.02
