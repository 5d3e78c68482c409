"""Collator: from conversations with pictures to a training batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

IGNORE_INDEX = -100
# Where a content part of type "image" may hold its picture.
PICTURE_KEYS = ("image", "url", "path", "base64")


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
        ValueError: If a row is longer than `max_length`, holds no assistant turn, or has more or fewer pictures than
            placeholders; the message names the row.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """
        Args:
            rows (`list[dict]`):
                Rows with `messages` (chat messages whose content parts of type `"image"` are placeholders) and `images`
                (the pictures, in order: PIL images, arrays, paths or URLs), which may be missing or `None` where there
                are no placeholders.

        Returns:
            `BatchFeature`: the processor's inputs, padded on the right, and `labels` `(B, T)` of type int64.
        """
        batch = self.processor.apply_chat_template(
            [with_images(row, number) for number, row in enumerate(rows)],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        is_target = torch.as_tensor(batch.pop("assistant_masks")).bool()
        without_target = (~is_target.any(dim=1)).nonzero().flatten().tolist()
        if without_target:
            raise ValueError(
                f"rows {without_target} of the batch hold no assistant turn, so there is nothing to learn from them: "
                "drop them, or mark what the assistant says with `{% generation %}` in the chat template."
            )
        lengths = batch["attention_mask"].sum(dim=1)
        if self.max_length is not None and int(lengths.max()) > self.max_length:
            raise ValueError(
                f"row {int(lengths.argmax())} of the batch has {int(lengths.max())} tokens, more than `max_length` "
                f"({self.max_length}): raise it, or drop or shorten the row."
            )
        batch["labels"] = batch["input_ids"].masked_fill(~is_target, IGNORE_INDEX)
        return batch


def with_images(row: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """
    The messages of a row, with every picture at its placeholder.

    Args:
        row (`dict`):
            A row as [`VisionLanguageCollator`] takes it.
        number (`int`):
            What the message of an error calls the row.

    Returns:
        `list[dict]`: chat messages; a part of type `"image"` that brings its own picture keeps it.

    Raises:
        ValueError: If there are more or fewer pictures than placeholders.
    """
    images = [] if row.get("images") is None else list(row["images"])
    num_placeholders = sum(_is_placeholder(part) for message in row["messages"] for part in _parts(message))
    if num_placeholders != len(images):
        raise ValueError(
            f"row {number} has {len(images)} pictures in `images`, but {num_placeholders} placeholders in `messages` "
            "(content parts of type 'image' without a picture of their own): give one picture for each."
        )
    waiting = iter(images)
    return [
        message | {"content": [_filled(part, waiting) for part in _parts(message)]} if _parts(message) else message
        for message in row["messages"]
    ]


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message's content; none where it is plain text."""
    content = message["content"]
    return [] if content is None or isinstance(content, str) else content


def _is_placeholder(part: dict[str, Any]) -> bool:
    return part["type"] == "image" and all(part.get(key) is None for key in PICTURE_KEYS)


def _filled(part: dict[str, Any], waiting: Iterator[Any]) -> dict[str, Any]:
    """A part with its picture: its own, or the next one that waits."""
    if part["type"] != "image":
        return part
    if _is_placeholder(part):
        part = part | {"image": next(waiting)}
    # Rows of a table have every key of every part. Processors take no `Path`.
    return {key: str(value) if isinstance(value, Path) else value for key, value in part.items() if value is not None}
