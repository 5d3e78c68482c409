"""The built-in data as conversations."""

from __future__ import annotations

from datasets import Dataset

from .scenes import to_messages


def conversations(dataset: Dataset) -> Dataset:
    """
    Rows of the built-in data as conversations, made when they are read.

    Args:
        dataset (`datasets.Dataset`):
            Rows of [`~toolbox.demo.scenes`] or [`~toolbox.demo.emoji_questions`].

    Returns:
        `datasets.Dataset`: rows with `messages` and `images`.
    """
    return dataset.with_transform(_to_conversations)


def _to_conversations(batch: dict[str, list]) -> dict[str, list]:
    rows = [to_messages(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return {"messages": [row["messages"] for row in rows], "images": [row["images"] for row in rows]}
