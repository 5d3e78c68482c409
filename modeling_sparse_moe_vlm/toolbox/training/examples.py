"""Texts and images of rows, from which a tokenizer and an image processor are made."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset

NUM_ROWS_OF_STREAM = 10_000

Examples: TypeAlias = Dataset | Sequence[dict[str, Any]]


def first_rows(rows: IterableDataset, num_with_images: int) -> list[dict[str, Any]]:
    """
    Returns the first 10,000 rows of a stream. To save memory, only the first `num_with_images` keep their images and
    videos.
    """
    return [
        row if number < num_with_images else row | {name: [] for name in ("images", "videos") if name in row}
        for number, row in enumerate(itertools.islice(rows, NUM_ROWS_OF_STREAM))
    ]


def texts_of(examples: Examples) -> Iterator[str]:
    """Yields a text for each row of messages or of questions and answers, with its turns on separate lines."""
    for row in examples.remove_columns(_media_columns(examples)) if isinstance(examples, Dataset) else examples:
        if "messages" in row:
            yield "\n".join(_text_of(message["content"]) for message in row["messages"])
        else:
            yield f"{row['question']}\n{row['answer']}"


def images_of(examples: Examples, number: int) -> list[Any]:
    """Returns the images of about `number` rows (up to twice as many), evenly spread over all rows."""
    chosen = (examples[i] for i in range(0, len(examples), max(len(examples) // number, 1)))
    return [image for row in chosen for image in ([row["image"]] if "image" in row else row["images"])]


def _media_columns(examples: Dataset) -> list[str]:
    return [column for column in ("image", "images", "videos") if column in examples.column_names]


def _text_of(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
