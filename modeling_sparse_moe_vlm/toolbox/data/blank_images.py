"""A row with a blank image for batches without images, so that all processes run the vision encoder in every step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from .packing import IGNORE_INDEX

BLANK_ROW: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "."}]},
    ],
    "images": [Image.new("RGB", (64, 64))],
}


def is_sharded_by_accelerate() -> bool:
    """Returns whether several processes use Accelerate's FSDP. Also known in the workers of a data loader."""
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return uses_fsdp and int(os.environ.get("WORLD_SIZE", "1")) > 1


def mask_last_row(batch: Mapping[str, Any]) -> dict[str, Any]:
    """
    Makes the last row of a batch padding that is not a target.

    Args:
        batch (`Mapping`):
            Inputs of a model, padded on the right, with `attention_mask` and `labels`.

    Returns:
        `dict`: The inputs. They have `position_ids` of shape `(rows, length)` if the model has multimodal rotary
        embeddings, because such models cannot compute positions of rows that only consist of padding.
    """
    masked = dict(batch)
    for name, value in (("attention_mask", 0), ("labels", IGNORE_INDEX)):
        masked[name] = batch[name].clone()
        masked[name][-1] = value
    if any(name.endswith("grid_thw") for name in batch):
        masked["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(batch["input_ids"].shape)
    return masked
