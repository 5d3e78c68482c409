"""Square patches of images, as vision towers with native sizes and the processor exchange them."""

from __future__ import annotations

import torch

# Height and width of an image in patches.
Grid = tuple[int, int]


def to_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    Cuts images of the same size into patches.

    Args:
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`):
            The images.
        patch_size (`int`):
            Side of a patch in pixels, which divides the height and the width.

    Returns:
        `torch.Tensor` of shape `(num_patches, channels * patch_size**2)`: The patches of all images, by row.
    """
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * patch_size**2)


def to_images(patches: torch.Tensor, grid: Grid, patch_size: int) -> torch.Tensor:
    """
    Puts the patches of images of the same size together.

    Args:
        patches (`torch.Tensor` of shape `(num_patches, channels * patch_size**2)`):
            The patches of all images, by row.
        grid (`tuple[int, int]`):
            Height and width of an image in patches.
        patch_size (`int`):
            Side of a patch in pixels.

    Returns:
        `torch.Tensor` of shape `(num_images, channels, height, width)`: The images.
    """
    images = patches.reshape(-1, *grid, patches.shape[1] // patch_size**2, patch_size, patch_size)
    return images.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
