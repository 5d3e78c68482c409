"""Batches whose own rows are all bad. They get a row of another batch, which has no weight in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .packing import IGNORE_INDEX, PADDING_POSITION


class RepeatedRow(dict):
    """
    A row that another batch also has. It is the only row of a batch whose own rows are all bad, because a batch must
    not be empty: with several processes, all of them run the model in every step.
    """


@dataclass
class CollatorForTraining:
    """
    Collates rows, so that a batch with only a [`RepeatedRow`] does not contribute to the training: none of its tokens
    is a target.

    Args:
        collator (`Callable`):
            Makes a batch of rows.
        marks_padding (`bool`):
            Whether the model has experts of this package. All tokens of the batch are then padding, so they are not
            part of router losses and routing statistics. Padding is marked by positions, as in packed batches, because
            some base models fail if an attention mask has no token.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    marks_padding: bool

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Returns the batch. Batches without `labels` stay as the collator makes them."""
        batch = self.collator(rows)
        if not all(isinstance(row, RepeatedRow) for row in rows) or "labels" not in batch:
            return batch
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        if self.marks_padding:
            batch.pop("attention_mask", None)
            batch["position_ids"] = torch.full_like(batch.get("position_ids", batch["input_ids"]), PADDING_POSITION)
            batch["use_cache"] = False
        return batch
