"""Sizes of rows in tokens and images: limits for rows and batches, and batches that know the sizes of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ...image_reading import read_images
from .bad_rows import NOT_PROCESSED, TOO_LONG, TOO_MANY_IMAGE_TOKENS, RowFault
from .rows import apply_chat_template, with_images


@dataclass(frozen=True)
class RowSize:
    """
    Size of a row.

    Args:
        name (`str`):
            Name of the row, such as `"train.jsonl, row 12"`.
        tokens (`int`):
            Number of tokens, image tokens included.
        images (`int`):
            Number of images.
        image_tokens (`int`):
            Number of image tokens, those of videos included.
        videos (`int`, *optional*, defaults to 0):
            Number of videos.
    """

    name: str
    tokens: int
    images: int
    image_tokens: int
    videos: int = 0

    def __str__(self) -> str:
        videos = f", videos: {self.videos}" if self.videos else ""
        return f"{self.name} (tokens: {self.tokens}, images: {self.images}{videos}, image tokens: {self.image_tokens})"


class SizedBatch(BatchFeature):
    """
    Inputs of a model, with the sizes of the rows that they were made of. The sizes are an attribute and not an item,
    so the model does not receive them. Worker processes and moves to a device keep them.

    Args:
        data (`Mapping`, *optional*):
            Inputs of the model.
        row_sizes (`Sequence[RowSize]`, *optional*):
            Sizes of the rows.
    """

    def __init__(self, data: Any = None, row_sizes: Sequence[RowSize] = (), **kwargs: Any) -> None:
        super().__init__(data, **kwargs)
        self.row_sizes = list(row_sizes)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"row_sizes": self.row_sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.row_sizes = state["row_sizes"]


def check_limits(**limits: int | None) -> None:
    """Raises `ValueError` unless each limit is `None` or at least 1."""
    for name, limit in limits.items():
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"`{name}` must be a whole number of at least 1, but got {limit!r}.")


def sizes_of(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    batch: Mapping[str, Any],
    conversations: Sequence[list[dict[str, Any]]],
    names: Sequence[str],
) -> list[RowSize]:
    """
    Measures the rows of a batch.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model.
        batch (`Mapping`):
            Inputs with `input_ids` and `attention_mask`, as the processor returns them.
        conversations (`Sequence[list[dict]]`):
            Messages of each row.
        names (`Sequence[str]`):
            Name of each row.

    Returns:
        `list[RowSize]`: The size of each row, without padding.
    """
    input_ids, is_token = batch["input_ids"], batch["attention_mask"].bool()
    ids = torch.tensor(_image_token_ids(processor), dtype=input_ids.dtype, device=input_ids.device)
    tokens = is_token.sum(dim=1).tolist()
    image_tokens = (torch.isin(input_ids, ids) & is_token).sum(dim=1).tolist()
    images = [count_parts("image", messages) for messages in conversations]
    videos = [count_parts("video", messages) for messages in conversations]
    return [RowSize(*values) for values in zip(names, tokens, images, image_tokens, videos, strict=True)]


def find_excess(size: RowSize, max_length: int | None, max_image_tokens: int | None) -> RowFault | None:
    """Returns what is wrong with a row that exceeds a limit, or `None`."""
    if max_length is not None and size.tokens > max_length:
        return RowFault(
            TOO_LONG,
            f"has {size.tokens} tokens, more than `max_length` ({max_length}): increase `max_length`, or drop or "
            "shorten the row.",
        )
    if max_image_tokens is not None and size.image_tokens > max_image_tokens:
        videos = f" and {size.videos} videos" if size.videos else ""
        frames = "let the processor read fewer frames of videos, " if size.videos else ""
        return RowFault(
            TOO_MANY_IMAGE_TOKENS,
            f"has {size.image_tokens} image tokens in {size.images} images{videos}, more than `max_image_tokens` "
            f"({max_image_tokens}): increase `max_image_tokens`, use fewer or smaller images, {frames}or drop the row.",
        )
    return None


def check_size(
    row: Mapping[str, Any],
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    max_length: int | None,
    max_image_tokens: int | None,
) -> None:
    """
    Checks that the processor of a model takes a row, and that the row does not exceed the limits.

    Args:
        row (`Mapping`):
            A validated row.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model.
        max_length (`int`, *optional*):
            Largest number of tokens.
        max_image_tokens (`int`, *optional*):
            Largest number of image tokens, those of videos included.

    Raises:
        RowFault: If the processor fails, or if the row exceeds a limit.
    """
    messages = with_images(dict(row) | {"images": read_images(row["images"])}, 0)
    try:
        batch = apply_chat_template(processor, {0: messages}, padding_side="right", names={0: "the row"})
    except ValueError as error:
        raise RowFault(NOT_PROCESSED, str(error)) from error
    (size,) = sizes_of(processor, batch, [messages], ["the row"])
    if fault := find_excess(size, max_length, max_image_tokens):
        raise RowFault(fault.kind, f"the row {fault.reason}")


def check_batch(sizes: Sequence[RowSize], limit: int | None) -> None:
    """Raises `ValueError` if the rows of a batch have more image tokens than the limit."""
    total = sum(size.image_tokens for size in sizes)
    if limit is not None and total > limit:
        raise ValueError(
            f"the batch has {total} image tokens, more than `max_image_tokens_per_batch` ({limit}). Decrease the batch "
            f"size, or limit the image tokens of a row with `max_image_tokens`. Its rows: {'; '.join(map(str, sizes))}."
        )


def _image_token_ids(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of the tokens that stand for images and videos."""
    if not isinstance(processor, ProcessorMixin):
        return []
    ids: list[int] = []
    for kind in ("image", "video"):
        of_kind = [id for id in getattr(processor, f"{kind}_token_ids", []) if id is not None]
        token = getattr(processor, f"{kind}_token", None)
        if not of_kind and token is not None:
            of_kind = [processor.tokenizer.convert_tokens_to_ids(str(token))]  # type: ignore[attr-defined]
        ids += of_kind
    return ids


def count_parts(kind: str, messages: list[dict[str, Any]]) -> int:
    """Returns the number of content parts of a type in a conversation."""
    contents = [message.get("content") for message in messages]
    return sum(part["type"] == kind for parts in contents if isinstance(parts, list) for part in parts)
