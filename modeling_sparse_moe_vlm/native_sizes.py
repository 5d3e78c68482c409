"""Native sizes: images keep their aspect ratio and become patches, as many as their size needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .checks import check, check_integer
from .image_patches import to_patches
from .image_tiles import TILE_OPTIONS, check_size, resized_pixels, size_of

# Options of the processor that can also be passed per call.
NATIVE_OPTIONS = ("min_image_tokens", "max_image_tokens")
# Options of an image processor that do not concern the size of images.
_OPTIONS_OF_PIXELS = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
)
# Number of halvings of an interval of scales: the precision of a float.
_HALVINGS = 53


@dataclass(frozen=True)
class NativeSizing:
    """
    The sizes to which images are resized: multiples of the side of a token, close to the size of the image.

    Args:
        patch_size (`int`):
            Side of a patch in pixels.
        merge_size (`int`):
            Number of patches along the side of a token.
        has_separators (`bool`):
            Whether a token follows each row of image tokens.
        min_image_tokens (`int`):
            Smallest number of tokens of an image. Smaller images are enlarged.
        max_image_tokens (`int`):
            Largest number of tokens of an image, the separators included. Larger images are reduced.

    Raises:
        ValueError: If an option is invalid.
    """

    patch_size: int
    merge_size: int
    has_separators: bool
    min_image_tokens: int
    max_image_tokens: int

    def __post_init__(self) -> None:
        for field in ("patch_size", "merge_size", *NATIVE_OPTIONS):
            check_integer(field, getattr(self, field))
        check(
            self.min_image_tokens <= self.max_image_tokens,
            f"`min_image_tokens` ({self.min_image_tokens}) must not be larger than `max_image_tokens` "
            f"({self.max_image_tokens}, by default `image_seq_length`).",
        )
        check(
            self.num_tokens((1, 1)) <= self.max_image_tokens,
            f"`max_image_tokens` is {self.max_image_tokens}, but the smallest image has {self.num_tokens((1, 1))} "
            "tokens, one of them a separator: increase it.",
        )

    @property
    def token_side(self) -> int:
        """Side of the square of pixels that becomes one token."""
        return self.patch_size * self.merge_size

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """
        Returns the number of rows and columns of tokens of an image. It depends only on the size of the image. Both
        sides are scaled by the same factor and rounded to the nearest number of tokens, at least one. The factor is 1
        if that respects the limits. Otherwise, it is the one closest to 1 that does. If none respects both, the number
        of tokens may be smaller than `min_image_tokens`.

        Args:
            height (`int`):
                Height of the image.
            width (`int`):
                Width of the image.

        Returns:
            `tuple[int, int]`: Number of rows and of columns.

        Raises:
            ValueError: If the image has no pixels.
        """
        check_size(height, width)

        def tokens(scale: float) -> int:
            return self.num_tokens(self._scaled(height, width, scale))

        scale = 1.0
        if tokens(scale) < self.min_image_tokens:
            scale = 2.0
            while tokens(scale) < self.min_image_tokens:
                scale *= 2
            scale = _last(lambda value: tokens(value) >= self.min_image_tokens, scale, 1.0)
        if tokens(scale) > self.max_image_tokens:
            scale = _last(lambda value: tokens(value) <= self.max_image_tokens, 0.0, scale)
        return self._scaled(height, width, scale)

    def _scaled(self, height: int, width: int, scale: float) -> tuple[int, int]:
        rows, columns = (max(1, int(side * scale / self.token_side + 0.5)) for side in (height, width))
        return rows, columns

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Returns the number of tokens of an image with a grid of tokens, separators included."""
        rows, columns = grid
        return rows * (columns + self.has_separators)

    def num_patches(self, grid: tuple[int, int]) -> int:
        """Returns the number of patches of an image with a grid of tokens."""
        return grid[0] * grid[1] * self.merge_size**2

    def resize(
        self, image: Any, grid: tuple[int, int], image_processor: Any, options: Mapping[str, Any]
    ) -> torch.Tensor:
        """
        Resizes an image to a grid of tokens with an image processor.

        Args:
            image (`PIL.Image.Image` or `np.ndarray`):
                The image.
            grid (`tuple[int, int]`):
                Number of rows and of columns of tokens.
            image_processor (`BaseImageProcessor`):
                The image processor, which resizes, rescales and normalises. Those that cut images into patches
                themselves (they have a `patch_size`) are replaced by one with the same values that does not.
            options (`Mapping[str, Any]`):
                Options of the image processor.

        Returns:
            `torch.Tensor` of shape `(channels, height, width)`: The pixels.
        """
        if getattr(image_processor, "patch_size", None) is not None:
            names = [name for name in _OPTIONS_OF_PIXELS if getattr(image_processor, name, None) is not None]
            image_processor = SiglipImageProcessorPil(**{name: getattr(image_processor, name) for name in names})
        size = (grid[0] * self.token_side, grid[1] * self.token_side)
        return resized_pixels(image, size, image_processor, dict(options) | {"do_resize": True})

    def cut_into_patches(self, images: Sequence[Any], image_processor: Any, options: Mapping[str, Any]) -> BatchFeature:
        """
        Resizes images to their own grids of tokens, and cuts them into patches.

        Args:
            images (`Sequence`):
                The images.
            image_processor (`BaseImageProcessor`):
                See [`NativeSizing.resize`].
            options (`Mapping[str, Any]`):
                Options of the call, `return_tensors` included.

        Returns:
            `BatchFeature`: `pixel_values` of shape `(num_patches, channels * patch_size**2)`, the patches of all images
            by row, and `image_grid_thw` of shape `(num_images, 3)`: 1, and the height and the width of each image in
            patches.
        """
        own = {name: value for name, value in options.items() if name not in (*TILE_OPTIONS, *NATIVE_OPTIONS)}
        return_tensors = own.pop("return_tensors", None)
        grids = [self.grid_of(*size_of(image)) for image in images]
        pixels: Any = torch.cat(
            [
                to_patches(self.resize(image, grid, image_processor, own)[None], self.patch_size)
                for image, grid in zip(images, grids, strict=True)
            ]
        )
        if return_tensors != "pt":
            pixels = list(pixels.cpu().numpy())
        in_patches = [[1, rows * self.merge_size, columns * self.merge_size] for rows, columns in grids]
        return BatchFeature({"pixel_values": pixels, "image_grid_thw": in_patches}, tensor_type=return_tensors)


def native_sizing(processor: Any, given: Mapping[str, Any], kwargs: Mapping[str, Any]) -> NativeSizing:
    """
    Returns the sizes of images for a processor and a call.

    Args:
        processor (`SparseMoeVlmProcessor`):
            The processor, with `image_sizing="native"`.
        given (`Mapping[str, Any]`):
            Options for tiles and native sizes of the call.
        kwargs (`Mapping[str, Any]`):
            Arguments of the call for the image processor.

    Raises:
        ValueError: If an option is invalid, or if it is for images of a fixed size.
    """
    for name, neutral in (("min_tiles", 1), ("max_tiles", 1), ("do_pad", False)):
        value = given.get(name, getattr(processor, name))
        check(
            value == neutral,
            f'`{name}={value!r}` cannot be combined with `image_sizing="native"`: images keep their aspect ratio '
            "without tiles and padding.",
        )
    for name in ("size", "crop_size"):
        check(
            kwargs.get(name) is None,
            f'`{name}` cannot be combined with `image_sizing="native"`: limit the size of images with '
            "`max_image_tokens`.",
        )
    limits = {name: given.get(name, getattr(processor, name)) for name in NATIVE_OPTIONS}
    if limits["max_image_tokens"] is None:
        limits["max_image_tokens"] = processor.image_seq_length
    return NativeSizing(
        patch_size=processor.patch_size,
        merge_size=processor.merge_size,
        has_separators=processor.row_separator is not None,
        **limits,
    )


def _last(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Returns the last scale for which a condition holds, on the way from one for which it does to one outside."""
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside
