"""Inputs and batches of retrieval models: texts, images, and texts with images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ...checks import shown
from ...control_tokens import check_encodable
from ...image_reading import read_images
from .columns import IMAGE_FIELDS
from .formats import CAPTION_FIELDS
from .rows import apply_chat_template

NO_PARTNER = -1
# The columns with captions. The first one that a row has is used.
CAPTION_COLUMNS = ("captions", *CAPTION_FIELDS, "references")


def retrieval_inputs(
    processor: ProcessorMixin | PreTrainedTokenizerBase, items: Sequence[Any], names: Sequence[str] | None = None
) -> BatchFeature:
    """
    Makes inputs of a retrieval model. Each item is one user turn of a conversation, followed by the start of an
    assistant turn, as in sentence-transformers. So the embedding of a text or image does not depend on how it is given.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model, with a chat template.
        items (`Sequence`):
            Texts (strings), images (anything but a string, such as a PIL image), dicts with the keys `text` and `image`
            (in the order in which the model shall read them; `image` can also be a path), or lists of chat messages.
        names (`Sequence[str]`, *optional*):
            Name of each item in error messages. Defaults to `items[0]` and so on.

    Returns:
        `BatchFeature`: The inputs as tensors, with one row per item, padded on the right.

    Raises:
        ValueError: If there are no items, or if an item is empty, has a wrong type or cannot be processed. The message
            names the item.
    """
    if isinstance(items, str | Mapping) or not isinstance(items, Sequence):
        raise ValueError(f"`items` must be a list of texts and images, but got {type(items)}: pass [item].")
    if not items:
        raise ValueError("`items` is empty: pass at least one text or image.")
    if names is None:
        names = [f"items[{number}]" for number in range(len(items))]
    conversations = [_as_messages(item, name) for item, name in zip(items, names, strict=True)]
    return apply_chat_template(
        processor,
        dict(enumerate(conversations)),
        padding_side="right",
        names=dict(enumerate(names)),
        add_generation_prompt=True,
    )


def _as_messages(item: Any, name: str) -> list[dict[str, Any]]:
    """Returns the conversation with one turn that contains an item, or the conversation that the item is."""
    if isinstance(item, list | tuple):
        if not item or not all(isinstance(message, Mapping) and "role" in message for message in item):
            raise ValueError(f"{name} must be a text, an image, a dict or a list of messages, but got {shown(item)}.")
        return list(item)
    parts = item if isinstance(item, Mapping) and not _is_image_file(item) else None
    if parts is None:
        parts = {"text": item} if isinstance(item, str) else {"image": item}
    if not parts or not set(parts) <= {"text", "image"}:
        raise ValueError(f"{name} must have the keys `text` and `image`, or one of them, but has {list(parts)}.")
    content = []
    for kind, value in parts.items():
        if kind == "image":
            content.append({"type": "image", "image": _read(value, name)})
        elif isinstance(value, str) and value.strip():
            check_encodable(value, name)
            content.append({"type": "text", "text": value})
        else:
            raise ValueError(f"{name} must have a text that is not empty, but got {shown(value)}.")
    return [{"role": "user", "content": content}]


def _is_image_file(item: Mapping[str, Any]) -> bool:
    """Whether a dict is an image in the form of an `Image` column that is not decoded."""
    return bool(item) and set(item) <= {"bytes", "path"}


def _read(image: Any, name: str) -> Any:
    if image is None:
        raise ValueError(f"{name} has no image: got None.")
    try:
        (read,) = read_images([image])
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).replace('images[0]', 'the image', 1)}") from error
    return read


class Pair(NamedTuple):
    """
    An image (or several that belong together) and its captions.

    Args:
        image (`Any`):
            The image, or a list of chat messages with the images.
        captions (`list[Any]`):
            The captions: at least one text, or dict with `text` and `image`.
        negatives (`list[Any]`):
            Hard negatives: captions that do not fit the image, and images that do not fit the captions.
        image_id (`str`, *optional*):
            Identity of the image. Pairs with the same identity are not negatives of each other.
        name (`str`):
            Name of the row in error messages.
    """

    image: Any
    captions: list[Any]
    negatives: list[Any]
    image_id: str | None
    name: str


def read_pair(row: Mapping[str, Any], number: int) -> Pair:
    """
    Reads a row for retrieval.

    Args:
        row (`Mapping`):
            Row in the form that [`~toolbox.data.RetrievalCollator`] takes.
        number (`int`):
            Number of the row in error messages, unless it has the fields `source` and `row`.

    Returns:
        `Pair`: The image and its captions.

    Raises:
        ValueError: If the row has no image, no captions, or values of a wrong type. The message names the row.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} must be a dict with an image and captions, but got {shown(row)}.")
    name = f"row {number}" if row.get("source") is None else f"{row['source']}, row {row.get('row')}"
    images = row_images(row)
    if not images:
        raise ValueError(f"{name} has no image: its fields are {list(row)}. Give one in `image`.")
    negatives = row.get("negatives") or []
    if not isinstance(negatives, list | tuple):
        raise ValueError(f"{name}: `negatives` must be a list of texts or images, but got {shown(negatives)}.")
    image_id = row.get("image_id")
    return Pair(
        image=images[0] if len(images) == 1 else _as_one_turn(images, name),
        captions=_captions(row, name),
        # Rows of a table have all keys, with `None` as value.
        negatives=[_without_none(item) if isinstance(item, Mapping) else item for item in negatives],
        image_id=None if image_id is None else str(image_id),
        name=name,
    )


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """Returns the images in the first column of a row that has images, without those that are `None`."""
    images: Any = next((row[field] for field in IMAGE_FIELDS if row.get(field) is not None), [])
    return [image for image in (images if isinstance(images, list | tuple) else [images]) if image is not None]


def _without_none(item: Mapping[str, Any]) -> Any:
    kept = {key: value for key, value in item.items() if value is not None}
    return kept["text"] if set(kept) == {"text"} else kept


def _as_one_turn(images: list[Any], name: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": _read(image, name)} for image in images]}]


def _captions(row: Mapping[str, Any], name: str) -> list[Any]:
    """Returns the captions of a row: those of its first field with captions, or its last assistant turn."""
    for field in CAPTION_COLUMNS:
        if row.get(field):
            captions = row[field]
            return list(captions) if isinstance(captions, list | tuple) else [captions]
    answers = [message for message in row.get("messages") or [] if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{name} has no caption: its fields are {list(row)}. Give one in `caption` or `captions`.")
    content = answers[-1]["content"]
    return [content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)]


@dataclass
class RetrievalCollator:
    """
    Data collator that turns images with captions into training batches of a retrieval model.

    Args:
        processor (`ProcessorMixin`):
            Processor of the model.
        max_length (`int`, *optional*):
            Largest number of tokens of a text or image. Longer ones are an error: they are never truncated.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """
        Makes a batch of rows.

        Args:
            rows (`Sequence[Mapping]`):
                Rows with the following fields, such as those of [`~toolbox.data.load_pairs`].

                - `image` (or `images`, which belong together): the document.
                - `captions` (a list), `caption` or `text`: the queries. A row can have several captions: each is a
                  query with the same image. In rows of [`~toolbox.data.load_rows`], the captions are `references` or,
                  if there are none, the last turn of the assistant.
                - `negatives` (a list, *optional*): hard negatives. A text is a caption that fits no image of the batch,
                  an image is one that fits no caption of the batch.
                - `image_id` (a string or number, *optional*): rows with the same value show the same image, so they are
                  not negatives of each other, also across processes. By default, every row shows another image.

        Returns:
            `BatchFeature`: The inputs of the model with one row per text and image (first all captions, then all
            images, then the hard negatives), padded on the right; `labels`, an int64 tensor `(B,)`, which says which
            rows belong together (-1 for hard negatives); and `is_document`, a bool tensor `(B,)`, which says which rows
            are images.

        Raises:
            ValueError: If there are no rows, or if a row is malformed, cannot be processed or has an item that is
                longer than `max_length`. The message names the row.
        """
        if not rows:
            raise ValueError("the batch has no rows: pass at least one.")
        pairs = [read_pair(row, number) for number, row in enumerate(rows)]
        labels = [_label(pair.image_id, number) for number, pair in enumerate(pairs)]
        entries = [
            *((item, label, False, pair.name) for pair, label in zip(pairs, labels) for item in pair.captions),
            *((pair.image, label, True, pair.name) for pair, label in zip(pairs, labels)),
            *((item, NO_PARTNER, _is_image(item), pair.name) for pair in pairs for item in pair.negatives),
        ]
        items, of_entries, is_document, names = zip(*entries)
        batch = retrieval_inputs(self.processor, items, names)
        lengths = batch["attention_mask"].sum(dim=1)
        if self.max_length is not None and int(lengths.max()) > self.max_length:
            raise ValueError(
                f"an item of {names[int(lengths.argmax())]} has {int(lengths.max())} tokens, more than `max_length` "
                f"({self.max_length}): increase `max_length`, or drop or shorten it."
            )
        batch["labels"] = torch.tensor(of_entries)
        batch["is_document"] = torch.tensor(is_document)
        return batch


def _label(image_id: str | None, number: int) -> int:
    """Returns the label of a row: the same for the same image in all processes, or one for this batch only."""
    if image_id is None:
        return NO_PARTNER - 1 - number
    digest = hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _is_image(item: Any) -> bool:
    if isinstance(item, Mapping) and not _is_image_file(item):
        return "text" not in item
    return not isinstance(item, str)
