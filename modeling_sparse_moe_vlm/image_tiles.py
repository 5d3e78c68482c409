"""Tiles: images of any shape are cut into tiles of the size that the vision tower takes, followed by a thumbnail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from .checks import check, check_integer

# Choosing a grid takes time and memory that grow with the square of this number.
_MOST_TILES = 1_000
# Options of the processor that can also be passed per call.
TILE_OPTIONS = ("min_tiles", "max_tiles", "max_image_tokens", "do_pad")


@dataclass(frozen=True)
class Tiling:
    """
    How images are cut into tiles.

    Args:
        tile_size (`tuple[int, int]`, *optional*):
            Height and width of a tile in pixels. `None` if there is only one tile per image.
        tokens_per_tile (`int`):
            Number of image tokens of a tile.
        has_separators (`bool`):
            Whether a token follows each row of tiles.
        min_tiles (`int`):
            Smallest number of tiles of an image, the thumbnail excluded.
        max_tiles (`int`):
            Largest number of tiles of an image, the thumbnail excluded.
        max_image_tokens (`int`, *optional*):
            Largest number of tokens of an image, the thumbnail and the separators included.
        do_pad (`bool`):
            Whether images keep their aspect ratio and are padded at the bottom or on the right.

    Raises:
        ValueError: If an option is invalid, or if one tile has more tokens than `max_image_tokens`.
    """

    tile_size: tuple[int, int] | None
    tokens_per_tile: int
    has_separators: bool
    min_tiles: int
    max_tiles: int
    max_image_tokens: int | None
    do_pad: bool

    def __post_init__(self) -> None:
        check_integer("min_tiles", self.min_tiles)
        check_integer("max_tiles", self.max_tiles, at_most=_MOST_TILES)
        check(
            self.min_tiles <= self.max_tiles,
            f"`min_tiles` ({self.min_tiles}) must not be larger than `max_tiles` ({self.max_tiles}).",
        )
        check(isinstance(self.do_pad, bool), f"`do_pad` must be `True` or `False`, got {self.do_pad!r}.")
        if self.max_image_tokens is not None:
            check_integer("max_image_tokens", self.max_image_tokens)
            check(
                self.tokens_per_tile <= self.max_image_tokens,
                f"`max_image_tokens` is {self.max_image_tokens}, but one tile already has {self.tokens_per_tile} "
                "tokens: increase it.",
            )

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """
        Chooses the grid of tiles whose aspect ratio is closest to that of an image. It depends only on the size of the
        image.

        Args:
            height (`int`):
                Height of the image.
            width (`int`):
                Width of the image.

        Returns:
            `tuple[int, int]`: Number of rows and of columns.

        Raises:
            ValueError: If the image has no pixels, or if no grid with at least `min_tiles` tiles has at most
                `max_image_tokens` tokens.
        """
        check_size(height, width)
        if self.max_tiles == 1:
            return 1, 1
        assert self.tile_size is not None
        most_tiles = self.max_tiles
        if self.max_image_tokens is not None:
            # Grids with more tiles have too many tokens. They are not tried one by one.
            most_tiles = max(self.min_tiles, min(most_tiles, self.max_image_tokens // self.tokens_per_tile))
        for max_tiles in range(most_tiles, self.min_tiles - 1, -1):
            columns, rows = get_optimal_tiled_canvas((height, width), self.tile_size, self.min_tiles, max_tiles)
            if self.max_image_tokens is None or self.num_tokens((rows, columns)) <= self.max_image_tokens:
                return rows, columns
        raise ValueError(
            f"an image of {height} × {width} pixels with at least {self.min_tiles} tiles (`min_tiles`) has "
            f"{self.num_tokens((rows, columns))} tokens, more than `max_image_tokens` ({self.max_image_tokens}): "
            "increase `max_image_tokens` or decrease `min_tiles`."
        )

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Returns the number of tokens of an image with a grid of tiles, separators included."""
        separators = grid[0] if self.has_separators and grid != (1, 1) else 0
        return num_tiles(grid) * self.tokens_per_tile + separators


def num_tiles(grid: tuple[int, int]) -> int:
    """Returns the number of tiles of an image. The thumbnail is included: images of several tiles have one."""
    rows, columns = grid
    return 1 if grid == (1, 1) else rows * columns + 1


def tile_size_of(image_processor: Any, options: Mapping[str, Any]) -> tuple[int, int]:
    """
    Returns the height and the width of the images that an image processor returns.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor.
        options (`Mapping[str, Any]`):
            Options of the call, which override those of the image processor.

    Raises:
        ValueError: If the image processor does not resize images to a fixed size.
    """

    def option(name: str) -> Any:
        return getattr(image_processor, name, None) if options.get(name) is None else options[name]

    name = "crop_size" if option("do_center_crop") else "size"
    size = option(name)
    if isinstance(size, int):
        size = {"height": size, "width": size}
    sides: dict[str, Any] = {side: (size or {}).get(side) for side in ("height", "width")}
    check(
        bool(option("do_resize")) and all(sides.values()),
        "tiles and `do_pad` need an image processor that resizes images to a fixed size, but "
        f"{type(image_processor).__name__} has `do_resize={option('do_resize')}` and `{name}={size}`: set `do_resize` "
        "and a size with `height` and `width`, or use `max_tiles=1` without `do_pad`.",
    )
    return sides["height"], sides["width"]


def cut_into_tiles(
    image: Any, grid: tuple[int, int], tiling: Tiling, image_processor: Any, options: Mapping[str, Any]
) -> torch.Tensor:
    """
    Resizes an image to a grid of tiles with an image processor, and cuts it.

    Args:
        image (`PIL.Image.Image` or `np.ndarray`):
            The image.
        grid (`tuple[int, int]`):
            Number of rows and of columns.
        tiling ([`Tiling`]):
            Size of the tiles, and whether to pad the image.
        image_processor (`BaseImageProcessor`):
            The image processor, which resizes, rescales and normalises.
        options (`Mapping[str, Any]`):
            Options of the image processor.

    Returns:
        `torch.Tensor` of shape `(num_tiles, channels, tile height, tile width)`: The tiles by row. If there are
        several, the thumbnail of the whole image follows.
    """
    assert tiling.tile_size is not None
    height, width = tiling.tile_size
    rows, columns = grid

    def resized(height: int, width: int) -> torch.Tensor:
        inner = _inner_size(image, height, width) if tiling.do_pad else (height, width)
        pixels = resized_pixels(image, inner, image_processor, options)
        # Zero is the mean colour of normalised images.
        return torch.nn.functional.pad(pixels, (0, width - inner[1], 0, height - inner[0]))

    canvas = resized(rows * height, columns * width)
    tiles = canvas.unfold(1, height, height).unfold(2, width, width)  # (channels, rows, columns, height, width)
    tiles = tiles.flatten(1, 2).transpose(0, 1)
    if grid == (1, 1):
        return tiles.contiguous()
    return torch.cat([tiles, resized(height, width)[None]])


def resized_pixels(image: Any, size: tuple[int, int], image_processor: Any, options: Mapping[str, Any]) -> torch.Tensor:
    """
    Resizes an image to a given size with an image processor.

    Args:
        image (`PIL.Image.Image` or `np.ndarray`):
            The image.
        size (`tuple[int, int]`):
            Height and width of the result.
        image_processor (`BaseImageProcessor`):
            The image processor, which resizes, rescales and normalises. It does not crop or pad.
        options (`Mapping[str, Any]`):
            Options of the image processor.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`: The pixels.
    """
    changed = dict(options) | {"size": dict(zip(("height", "width"), size, strict=True)), "return_tensors": "pt"}
    for name in ("do_center_crop", "do_pad"):
        if changed.get(name) or getattr(image_processor, name, None):
            changed[name] = False
    return image_processor([image], **changed)["pixel_values"][0]


def check_size(height: int, width: int) -> None:
    """Raises `ValueError` if an image has no pixels."""
    check(height >= 1 and width >= 1, f"an image of {height} × {width} pixels has no pixels.")


def size_of(image: Any) -> tuple[int, int]:
    """Returns the height and the width of a PIL image or of an array of shape `(H, W, C)`."""
    return (image.height, image.width) if hasattr(image, "mode") else image.shape[:2]


def _inner_size(image: Any, height: int, width: int) -> tuple[int, int]:
    """Returns the largest height and width within bounds that keep the aspect ratio of an image."""
    image_height, image_width = size_of(image)
    if image_height * width > image_width * height:
        return height, max(1, round(image_width * height / image_height))
    return max(1, round(image_height * width / image_width)), width
