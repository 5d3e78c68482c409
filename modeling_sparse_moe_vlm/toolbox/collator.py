"""Collator: from conversations with pictures to a training batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

IGNORE_INDEX = -100


@dataclass
class VisionLanguageCollator:
    """
    Makes training batches for models with a chat template that marks what the assistant says (`{% generation %}`): only
    those tokens are targets.

    Args:
        processor (`ProcessorMixin`):
            Processor of the model.
        max_length (`int`, *optional*):
            Longest allowed row in tokens. Rows are never truncated.

    Raises:
        ValueError: If a row is longer than `max_length` or holds no assistant turn; the message names the row.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """
        Args:
            rows (`list[dict]`):
                Rows with `messages` (chat messages whose content parts of type `"image"` are placeholders) and `images`
                (the pictures, in order).

        Returns:
            `BatchFeature`: the processor's inputs, padded on the right, and `labels` `(B, T)` of type int64.
        """
        batch = self.processor.apply_chat_template(
            [with_images(row) for row in rows],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        is_target = torch.as_tensor(batch.pop("assistant_masks")).bool()
        labels = batch["input_ids"].masked_fill(~is_target, IGNORE_INDEX)
        for row in (~is_target.any(dim=1)).nonzero().flatten().tolist():
            raise ValueError(f"row {row} of the batch holds no assistant turn, so there is nothing to learn from it.")
        lengths = batch["attention_mask"].sum(dim=1)
        if self.max_length is not None and int(lengths.max()) > self.max_length:
            raise ValueError(
                f"row {int(lengths.argmax())} of the batch has {int(lengths.max())} tokens, more than `max_length` "
                f"({self.max_length}): raise it, or drop or shorten the row."
            )
        batch["labels"] = labels
        return batch


def with_images(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row, with every picture at its placeholder."""
    images = iter(row["images"])
    messages = [
        {
            "role": message["role"],
            "content": [
                part | {"image": next(images, None)} if part["type"] == "image" and "image" not in part else part
                for part in message["content"]
            ],
        }
        if not isinstance(message["content"], str)
        else message
        for message in row["messages"]
    ]
    return messages
