"""Collator: from conversations with images to a training batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from .rows import apply_chat_template, with_images

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
        ValueError: If a row is wrong (see [`~data.rows.with_images`]), cannot be processed, is longer than `max_length`
            or has no assistant turn; the message names the row.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """
        Args:
            rows (`Sequence[Mapping]`):
                Rows with `messages` (chat messages whose content parts of type `"image"` are placeholders) and `images`
                (the images, in order: PIL images, arrays, paths or URLs), which may be missing or `None` where there
                are no placeholders.

        Returns:
            `BatchFeature`: the processor's inputs, padded on the right, and `labels` `(B, T)` of type int64.
        """
        if not rows:
            raise ValueError("the batch has no rows.")
        batch = apply_chat_template(
            self.processor,
            {number: with_images(row, number) for number, row in enumerate(rows)},
            padding_side="right",
            return_assistant_tokens_mask=True,
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
