"""Conversion of the built-in data to conversations."""

from __future__ import annotations

from datasets import Dataset

from .scenes import to_messages


def conversations(dataset: Dataset) -> Dataset:
    """
    Turns rows of the built-in data into conversations. Each row is converted when it is read.

    Args:
        dataset (`datasets.Dataset`):
            Dataset that [`~toolbox.demo.scenes`] or [`~toolbox.demo.emoji_questions`] returns.

    Returns:
        `datasets.Dataset`: Rows with the columns `messages` and `images`, in the form that
        [`~toolbox.data.VisionLanguageCollator`] takes. See [`~toolbox.demo.to_messages`].
    """
    return dataset.with_transform(_to_conversations)


def _to_conversations(batch: dict[str, list]) -> dict[str, list]:
    rows = [to_messages(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return {"messages": [row["messages"] for row in rows], "images": [row["images"] for row in rows]}
