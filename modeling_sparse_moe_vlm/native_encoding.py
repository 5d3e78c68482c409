"""Runs vision towers on images of different sizes, which are given as one list of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from .image_patches import Grid, to_images
from .native_towers import merge_size_of, num_channels_of


def grids_of(image_grid_thw: torch.Tensor, pixel_values: torch.Tensor, config: PreTrainedConfig) -> list[Grid]:
    """
    Checks the sizes of images.

    Args:
        image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`):
            1, and the height and the width of each image in patches.
        pixel_values (`torch.Tensor` of shape `(num_patches, channels * patch_size**2)`):
            The patches of all images.
        config (`SparseMoeVlmConfig`):
            Configuration of the whole model.

    Returns:
        `list[tuple[int, int]]`: Height and width of each image in patches.

    Raises:
        ValueError: If the shapes do not match, or if the patches of an image cannot be merged to tokens.
    """
    vision = config.vision_config
    width = num_channels_of(vision) * vision.patch_size**2
    if image_grid_thw.dim() != 2 or image_grid_thw.shape[1] != 3:
        raise ValueError(
            f"`image_grid_thw` must have the shape (images, 3), with 1, the height and the width of each image in "
            f"patches, got {tuple(image_grid_thw.shape)}."
        )
    if pixel_values.dim() != 2 or pixel_values.shape[1] != width:
        raise ValueError(
            f"`pixel_values` with `image_grid_thw` must have the shape (patches, {width}), got "
            f"{tuple(pixel_values.shape)}: use a processor with the `image_arguments` of the configuration."
        )
    side = merge_size_of(vision) * config.pixel_shuffle_factor
    grids = []
    for frames, rows, columns in image_grid_thw.tolist():
        if frames != 1 or rows < 1 or columns < 1 or rows % side or columns % side:
            raise ValueError(
                f"`image_grid_thw` has an image of {[frames, rows, columns]}, but it must be 1, and a height and a "
                f"width in multiples of the {side} patches along the side of a token."
            )
        grids.append((rows, columns))
    num_patches = sum(rows * columns for rows, columns in grids)
    if num_patches != pixel_values.shape[0]:
        raise ValueError(
            f"`image_grid_thw` is for {num_patches} patches, but `pixel_values` has {pixel_values.shape[0]}: pass both "
            "as the processor returns them."
        )
    return grids


def features_by_size(
    patches: torch.Tensor, grids: Sequence[Grid], config: PreTrainedConfig, encode: Callable[[torch.Tensor], Any]
) -> torch.Tensor:
    """
    Encodes images of different sizes with a vision tower that takes batches of images of one size.

    Args:
        patches (`torch.Tensor` of shape `(num_patches, channels * patch_size**2)`):
            The patches of all images.
        grids (`Sequence[tuple[int, int]]`):
            Height and width of each image in patches.
        config (`PreTrainedConfig`):
            Configuration of the vision tower.
        encode (`Callable`):
            Returns the patch features `(num_images, h·w, hidden_size)` of images `(num_images, channels, height,
            width)`. It is called once for each size.

    Returns:
        `torch.Tensor` of shape `(num_patches, hidden_size)`: The features, in the order of the patches.
    """
    images = patches.split([rows * columns for rows, columns in grids])
    features: list[torch.Tensor] = [*images]
    for grid in dict.fromkeys(grids):
        numbers = [number for number, own in enumerate(grids) if own == grid]
        encoded = encode(to_images(torch.cat([images[number] for number in numbers]), grid, config.patch_size))
        for number, own in zip(numbers, encoded, strict=True):
            features[number] = own
    return torch.cat(features)


def padded_inputs(patches: torch.Tensor, grids: Sequence[Grid], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """
    Returns the inputs of a NaFlex vision tower: the patches of each image, with the channels last, padded to the image
    with the most patches, a mask of the padding, and the height and the width of each image in patches.
    """
    channels_last = patches.view(len(patches), -1, config.patch_size**2).transpose(1, 2).flatten(1)
    images = channels_last.split([rows * columns for rows, columns in grids])
    mask = pad_sequence([image.new_ones(len(image), dtype=torch.int32) for image in images], batch_first=True)
    return {
        "pixel_values": pad_sequence(list(images), batch_first=True),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor(grids, device=patches.device),
    }


def sized_inputs(patches: torch.Tensor, grids: Sequence[Grid], config: PreTrainedConfig) -> dict[str, Any]:
    """
    Returns the inputs of a vision tower as of Pixtral: images `(num_images, channels, height, width)`, padded at the
    bottom and on the right to the largest height and width, and the height and the width of each image in pixels.
    """
    size = config.patch_size
    height, width = (max(sides) * size for sides in zip(*grids, strict=True))
    padded = patches.new_zeros(len(grids), patches.shape[1] // size**2, height, width)
    images = patches.split([rows * columns for rows, columns in grids])
    for canvas, image, grid in zip(padded, images, grids, strict=True):
        canvas[:, : grid[0] * size, : grid[1] * size] = to_images(image, grid, size)[0]
    return {"pixel_values": padded, "image_sizes": [(rows * size, columns * size) for rows, columns in grids]}


def merged_inputs(
    patches: torch.Tensor, grids: Sequence[Grid], config: PreTrainedConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns the inputs of a vision tower as of Qwen2-VL: the patches in the order in which the tower merges them, each
    repeated as if an image were a video of `temporal_patch_size` frames, and `grid_thw`.
    """
    side = merge_size_of(config)
    images = []
    for image, (rows, columns) in zip(patches.split([r * c for r, c in grids]), grids, strict=True):
        squares = image.view(rows // side, side, columns // side, side, -1).transpose(1, 2)
        images.append(squares.reshape(rows * columns, -1))
    ordered = torch.cat(images).unflatten(1, (-1, 1, config.patch_size**2))
    frames = ordered.expand(-1, -1, getattr(config, "temporal_patch_size", 1), -1).flatten(1)
    return frames, torch.tensor([(1, *grid) for grid in grids], device=patches.device)


@contextmanager
def loaded_embeddings(tower: nn.Module) -> Iterator[None]:
    """
    Loads the embeddings of a vision tower whose weights are offloaded. Towers that interpolate position embeddings read
    their weights without calling the module, so the hooks of Accelerate do not load them.

    Args:
        tower (`nn.Module`):
            The vision tower.
    """
    hooks: list[tuple[nn.Module, Any]] = [
        (module, module._hf_hook)
        for module in tower.modules()
        if isinstance(module, nn.Embedding) and hasattr(module, "_hf_hook")
    ]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)
