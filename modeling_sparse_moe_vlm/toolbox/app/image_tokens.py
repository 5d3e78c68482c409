"""Finds the tokens of each image of a prompt, and arranges them in the grid in which they cover the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...checks import check


@dataclass(frozen=True)
class TokenGrid:
    """
    The tokens of one image, as a grid.

    Args:
        positions (`np.ndarray` of shape `(rows, columns)`):
            Position in the prompt of the token of every cell, of type int64.
        overview (`np.ndarray` of shape `(side, side)`, *optional*):
            The same for the tokens of a small version of the whole image, which some models read after its tiles.
    """

    positions: np.ndarray
    overview: np.ndarray | None = None

    def spread(self, values: np.ndarray) -> np.ndarray:
        """
        Returns the shares of the cells. The share of an overview token is divided evenly among its cells.

        Args:
            values (`np.ndarray` of shape `(prompt length,)`):
                Share of every token of the prompt.

        Returns:
            `np.ndarray` of shape `(rows, columns)`.
        """
        cells = values[self.positions].astype(np.float64)
        if self.overview is None:
            return cells
        side = len(self.overview)
        row, column = (np.arange(size) * side // size for size in cells.shape)
        above = row[:, None] * side + column[None, :]
        num_cells = np.bincount(above.ravel(), minlength=side * side)
        return cells + (values[self.overview].ravel() / np.maximum(num_cells, 1))[above]


def token_grids(
    is_image: np.ndarray,
    lengths: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    *,
    tile_length: int | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    layouts: Sequence[tuple[int, int]] | None = None,
) -> list[TokenGrid]:
    """
    Finds the tokens of every image.

    Args:
        is_image (`np.ndarray` of shape `(prompt length,)`):
            Which tokens of the prompt are image tokens.
        lengths (`Sequence[int]`):
            Number of tokens of every image, in the order of the prompt.
        sizes (`Sequence[tuple[int, int]]`):
            Width and height of every image.
        tile_length (`int`, *optional*):
            Number of tokens of a tile, for models that may split images into tiles.
        shapes (`Sequence[tuple[int, int]]`, *optional*):
            Rows and columns of every image, if the processor returns them. By default, the tokens form a square.
        layouts (`Sequence[tuple[int, int]]`, *optional*):
            Rows and columns of tiles of every image, if the processor returns them. By default, the grid whose aspect
            ratio is closest to that of the image is used.

    Returns:
        `list[TokenGrid]`: One grid per image.

    Raises:
        ValueError: If the numbers of tokens do not add up, or the tokens of an image do not form a grid.
    """
    positions = np.flatnonzero(is_image)
    check(
        len(positions) == sum(lengths),
        f"the prompt has {len(positions)} image tokens, but its images have {list(lengths)} if processed separately.",
    )
    ends = np.cumsum(lengths)
    grids = []
    for number, (length, end) in enumerate(zip(lengths, ends)):
        own = positions[end - length : end]
        if shapes is not None:
            rows, columns = shapes[number]
            check(rows * columns == length, f"{length} image tokens do not form a grid of {rows} × {columns}.")
            grids.append(TokenGrid(own.reshape(rows, columns)))
        elif tile_length and length > tile_length and length % tile_length == 0:
            tiles = own.reshape(-1, tile_length)
            layout = tile_layout(len(tiles) - 1, sizes[number]) if layouts is None else layouts[number]
            grids.append(_tiled(tiles, layout))
        else:
            grids.append(TokenGrid(_square(own)))
    return grids


def tile_layout(num_tiles: int, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the numbers of rows and columns of tiles whose aspect ratio is closest to that of the image."""
    width, height = size
    layouts = [(rows, num_tiles // rows) for rows in range(1, num_tiles + 1) if num_tiles % rows == 0]
    return min(layouts, key=lambda layout: abs(math.log(layout[1] * height / (layout[0] * width))))


def _square(positions: np.ndarray) -> np.ndarray:
    side = math.isqrt(len(positions))
    check(side * side == len(positions) > 0, f"{len(positions)} image tokens do not form a square.")
    return positions.reshape(side, side)


def _tiled(tiles: np.ndarray, layout: tuple[int, int]) -> TokenGrid:
    """Arranges the tokens of tiles, which are in row-major order and followed by the overview."""
    *own, overview = (_square(tile) for tile in tiles)
    rows, columns = layout
    return TokenGrid(np.block([own[row * columns : (row + 1) * columns] for row in range(rows)]), overview)
