"""The grid of tokens that covers each image."""

import numpy as np
import pytest

from modeling_sparse_moe_vlm.toolbox.app.image_tokens import TokenGrid, tile_layout, token_grids


def is_image(*runs: tuple[int, int], length: int = 40) -> np.ndarray:
    """Returns a mask of image tokens with the given runs, by first position and length."""
    mask = np.zeros(length, dtype=bool)
    for first, number in runs:
        mask[first : first + number] = True
    return mask


def test_squares_of_adjacent_images():
    first, second = token_grids(is_image((2, 8)), [4, 4], [(9, 9), (9, 9)])
    assert first.positions.tolist() == [[2, 3], [4, 5]]
    assert second.positions.tolist() == [[6, 7], [8, 9]]
    assert first.overview is None


def test_images_of_different_lengths():
    first, second = token_grids(is_image((1, 9), (20, 4)), [9, 4], [(9, 9), (9, 9)])
    assert first.positions.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert second.positions.tolist() == [[20, 21], [22, 23]]


def test_shapes_of_the_processor():
    (grid,) = token_grids(is_image((3, 6)), [6], [(9, 9)], shapes=[(2, 3)])
    assert grid.positions.tolist() == [[3, 4, 5], [6, 7, 8]]


def test_tiles_line_by_line_and_an_overview():
    """Two tiles are beside each other, with two text tokens between them. An overview follows."""
    (grid,) = token_grids(is_image((0, 4), (6, 4), (12, 4)), [12], [(200, 100)], tile_length=4)
    assert grid.positions.tolist() == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert grid.overview is not None
    assert grid.overview.tolist() == [[12, 13], [14, 15]]


def test_tiles_in_lines_and_columns():
    (grid,) = token_grids(is_image((0, 7)), [7], [(200, 300)], tile_length=1)
    assert grid.positions.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert grid.overview is not None
    assert grid.overview.tolist() == [[6]]


def test_one_tile_has_no_overview():
    (grid,) = token_grids(is_image((5, 4)), [4], [(200, 100)], tile_length=4)
    assert grid.positions.tolist() == [[5, 6], [7, 8]]
    assert grid.overview is None


@pytest.mark.parametrize(
    ("num_tiles", "size", "layout"),
    [
        (1, (300, 100), (1, 1)),
        (2, (300, 100), (1, 2)),
        (2, (100, 300), (2, 1)),
        (4, (100, 100), (2, 2)),
        (4, (100, 390), (4, 1)),
        (6, (300, 200), (2, 3)),
        (6, (200, 300), (3, 2)),
        (12, (400, 300), (3, 4)),
    ],
)
def test_tile_layout(num_tiles, size, layout):
    assert tile_layout(num_tiles, size) == layout


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([4], {}, r"the prompt has 6 image tokens, but its images have \[4\] if processed"),
        ([6], {}, "6 image tokens do not form a square"),
        ([6], {"shapes": [(2, 2)]}, "6 image tokens do not form a grid of 2 × 2"),
        ([6], {"tile_length": 3}, "3 image tokens do not form a square"),
        ([6, 0], {"shapes": [(2, 3), (0, 1)]}, None),
    ],
)
def test_tokens_that_form_no_grid(lengths, options, message):
    def grids():
        return token_grids(is_image((0, 6)), lengths, [(9, 9)] * len(lengths), **options)

    if message is None:
        assert [grid.positions.shape for grid in grids()] == [(2, 3), (0, 1)]
    else:
        with pytest.raises(ValueError, match=message):
            grids()


def test_no_image_tokens():
    with pytest.raises(ValueError, match="0 image tokens do not form a square"):
        token_grids(is_image(), [0], [(9, 9)])


def test_spread():
    values = np.arange(10, dtype=np.float32)
    assert TokenGrid(np.array([[1, 2], [5, 6]])).spread(values).tolist() == [[1, 2], [5, 6]]


def test_spread_of_an_overview():
    """Each token of the overview covers 2 of the 8 cells, and half of its share goes to each."""
    grid = TokenGrid(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), np.array([[8, 9], [10, 11]]))
    values = np.array([0, 1, 2, 3, 4, 5, 6, 7, 20, 40, 60, 80.0])
    assert grid.spread(values).tolist() == [[10, 11, 22, 23], [34, 35, 46, 47]]
    assert grid.spread(values).sum() == values.sum()
