"""The section `processor` of a recipe: how the processor of our own architecture reads images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checks import check
from ...processing_sparse_moe_vlm import SparseMoeVlmProcessor
from ...video_reading import FrameSampling

# Keys of the section `processor`, with their types.
PROCESSOR_ARGUMENTS = {
    "min_tiles": int,
    "max_tiles": int,
    "min_image_tokens": int,
    "max_image_tokens": int | None,
    "do_pad": bool,
    "max_frames": int,
    "video_fps": float,
}


def set_processor_options(processor: Any, options: Mapping[str, Any]) -> None:
    """
    Sets how a processor cuts images into tiles and chooses frames of videos. It is saved with the model.

    Args:
        processor (`SparseMoeVlmProcessor`):
            The processor.
        options (`Mapping[str, Any]`):
            Options with the names of [`PROCESSOR_ARGUMENTS`].

    Raises:
        ValueError: If there are options and the processor is of another class, or if an option is invalid.
    """
    if not options:
        return
    check(
        type(processor).__name__ == SparseMoeVlmProcessor.__name__,
        f"the section `processor` of a recipe is for `SparseMoeVlmProcessor`, but the model has a "
        f"`{type(processor).__name__}`: remove the section.",
    )
    for name, value in options.items():
        setattr(processor, name, value)
    processor.tile_grid(1, 1)  # checks the options
    FrameSampling(processor.max_frames, processor.video_fps)
