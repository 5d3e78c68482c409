"""A data collator for reward models, which turns pairs of answers about images into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

from .collator import VisionLanguageCollator

SIDES = ("chosen", "rejected")
ORIGIN = ("source", "row")  # fields with which errors name a row


@dataclass
class PreferenceCollator:
    """
    Data collator for TRL's `RewardTrainer`, which by itself takes texts only. The first half of a batch are the
    conversations with the chosen answers, the second half those with the rejected answers. Both have the images and
    videos of their row. With FSDP in several processes, all rows need images, or none: a process without images would
    wait for the others.

    Args:
        processor (`ProcessorMixin`):
            Processor of the model.
        max_length (`int`, *optional*):
            Largest number of tokens of a conversation. Longer conversations are an error: they are never truncated.

    Example:

    ```python
    >>> from trl import RewardConfig, RewardTrainer
    >>> from modeling_sparse_moe_vlm.toolbox.data import PreferenceCollator

    >>> processor.tokenizer.chat_template = processor.chat_template
    >>> trainer = RewardTrainer(
    ...     model,
    ...     RewardConfig("reward", remove_unused_columns=False, max_length=None),
    ...     train_dataset=rows,  # columns "prompt", "chosen" and "rejected" with messages, and "images"
    ...     processing_class=processor.tokenizer,
    ...     data_collator=PreferenceCollator(processor),
    ... )
    ```
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns a batch.

        Args:
            rows (`Sequence[Mapping]`):
                Rows with the messages `chosen` and `rejected`, the messages `prompt` before both, if any, `images`,
                `videos`, and possibly a `margin` for the loss.

        Returns:
            `dict[str, torch.Tensor]`: The inputs of the model, and `margin` `(B,)` if the rows have it.

        Raises:
            ValueError: If a row lacks an answer, or if the collator of conversations refuses a row.
        """
        conversations = [
            {name: row[name] for name in ORIGIN if name in row}
            | {"messages": _conversation(row, side, number)}
            | {name: list(row.get(name) or []) for name in ("images", "videos")}
            for side in SIDES
            for number, row in enumerate(rows)
        ]
        # A row with a blank image would be part of a pair, so it would have a weight.
        collator = VisionLanguageCollator(self.processor, max_length=self.max_length, blank_images=False)
        batch = collator(conversations)
        del batch["labels"]
        if "margin" in rows[0]:
            batch["margin"] = torch.tensor([float(row["margin"]) for row in rows])
        return batch


def _conversation(row: Mapping[str, Any], side: str, number: int) -> list[Any]:
    if not row.get(side):
        raise ValueError(
            f"row {number} of the batch has no `{side}`: each row needs the messages `chosen` and `rejected`."
        )
    prompt, answer = list(row.get("prompt") or []), list(row[side])
    # `RewardTrainer` prepends the prompt when it tokenizes the rows, and keeps the column.
    return answer if prompt and answer[: len(prompt)] == prompt else prompt + answer
