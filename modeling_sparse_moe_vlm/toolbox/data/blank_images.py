"""A row with a blank image for batches without images, so that all processes run the vision encoder in every step."""

from __future__ import annotations

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
