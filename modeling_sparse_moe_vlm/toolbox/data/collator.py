"""The data collator, which turns conversations with images into training batches."""

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
    Data collator that turns conversations with images into training batches.

    Only the turns of the assistant have labels. The chat template of the processor must mark them with
    `{% generation %}`. All other tokens have the label -100, which the loss ignores.

    Args:
        processor (`ProcessorMixin`):
            Processor of the model.
        max_length (`int`, *optional*):
            Largest number of tokens in a row. Longer rows are an error: rows are never truncated.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """
        Makes a batch of rows.

        Args:
            rows (`Sequence[Mapping]`):
                Rows with the fields `messages` and `images`. `messages` is a list of chat messages, whose content parts
                of type `"image"` are placeholders, unless they contain an image themselves. `images` is the list of
                images for the placeholders, in order (PIL images, arrays, paths or URLs). It may be missing or `None`
                if there are no placeholders.

        Returns:
            `BatchFeature`: The inputs of the model, as the processor returns them, padded on the right, and the
            `labels`, an int64 tensor of shape `(batch_size, sequence_length)`.

        Raises:
            ValueError: If there are no rows, or if a row is malformed (see [`~toolbox.data.rows.with_images`]), cannot
                be processed, is longer than `max_length` or has no assistant turn. The message names the row by its
                position in the batch.
        """
        if not rows:
            raise ValueError("the batch has no rows: pass at least one.")
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
                f"rows {without_target} of the batch have no assistant turn, so there is nothing to learn from them: "
                "drop them, or mark what the assistant says with `{% generation %}` in the chat template."
            )
        lengths = batch["attention_mask"].sum(dim=1)
        if self.max_length is not None and int(lengths.max()) > self.max_length:
            raise ValueError(
                f"row {int(lengths.argmax())} of the batch has {int(lengths.max())} tokens, more than `max_length` "
                f"({self.max_length}): increase `max_length`, or drop or shorten the row."
            )
        batch["labels"] = batch["input_ids"].masked_fill(~is_target, IGNORE_INDEX)
        return batch
