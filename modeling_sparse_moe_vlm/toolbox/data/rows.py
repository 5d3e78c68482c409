"""
Rows of conversations with images: checks them, puts images at their placeholders and makes model inputs of them. Error
messages name the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ...control_tokens import check_encodable

# Keys under which a content part of type "image" may contain its image.
IMAGE_KEYS = ("image", "url", "path", "base64")


def row_name(row: Any, number: int) -> str:
    """
    Names a row in error messages.

    Args:
        row (`Any`):
            The row. Rows of [`~toolbox.data.load_rows`] know their `source` and their number in it, `row`.
        number (`int`):
            Position of the row, which names rows without these fields.

    Returns:
        `str`: Such as `"train.jsonl, row 12"` or `"row 3"`.
    """
    if has_origin(row):
        return f"{row['source']}, row {row['row']}"
    return f"row {number}"


def has_origin(row: Any) -> bool:
    """Whether a row knows its `source` and its number in it."""
    return isinstance(row, Mapping) and isinstance(row.get("source"), str) and isinstance(row.get("row"), int)


def with_images(row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """
    Returns the messages of a row, with every image at its placeholder.

    Args:
        row (`Mapping`):
            Row in the form that [`~toolbox.data.VisionLanguageCollator`] takes.
        number (`int`):
            Position of the row, for error messages about rows that do not know their source.

    Returns:
        `list[dict]`: Chat messages. A content part of type `"image"` that contains an image keeps it.

    Raises:
        ValueError: If a field is missing or has a wrong type, if a text cannot be encoded as UTF-8, or if the number of
            images differs from the number of placeholders. The message names the row and the field.
    """
    name = row_name(row, number)
    if not isinstance(row, Mapping):
        raise ValueError(f"{name} must be a dict with `messages` and `images`, got {type(row)}.")
    messages = _messages(row, name)
    images = _images(row.get("images"), name)
    num_placeholders = sum(_is_placeholder(part) for message in messages for part in _parts(message))
    if num_placeholders != len(images):
        raise ValueError(
            f"{name} has {len(images)} images in `images`, but {num_placeholders} placeholders in `messages` "
            "(content parts of type 'image' that do not contain an image): give one image for each placeholder."
        )
    remaining = iter(images)
    return [
        message | {"content": [_filled(part, remaining) for part in _parts(message)]} if _parts(message) else message
        for message in messages
    ]


def apply_chat_template(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    conversations: dict[int, list[dict[str, Any]]],
    padding_side: str,
    names: Mapping[int, str] | None = None,
    **kwargs: Any,
) -> BatchFeature:
    """
    Applies the chat template to conversations and makes padded model inputs of them.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model, or the tokenizer of a language model, which takes conversations without images.
        conversations (`dict[int, list[dict]]`):
            Messages of each conversation, by the number of its row.
        padding_side (`str`):
            `"left"` or `"right"`.
        names (`Mapping[int, str]`, *optional*):
            Name of each row in error messages. By default, its number.
        kwargs:
            Additional arguments of `processor.apply_chat_template`.

    Returns:
        `BatchFeature`: The inputs as PyTorch tensors.

    Raises:
        ValueError: If a conversation cannot be processed. The message names its row.
    """
    names = {number: f"row {number}" for number in conversations} if names is None else names
    kwargs |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if isinstance(processor, PreTrainedTokenizerBase):
        conversations = {number: joined_texts(messages, names[number]) for number, messages in conversations.items()}
        kwargs |= {"padding": True, "tokenizer_kwargs": {"padding_side": padding_side}}
    else:
        kwargs["processor_kwargs"] = {"padding": True, "padding_side": padding_side}
    try:
        return BatchFeature(dict(processor.apply_chat_template(list(conversations.values()), **kwargs)))
    except Exception:
        # Processes the conversations one by one to find the one that failed.
        for number, conversation in conversations.items():
            try:
                processor.apply_chat_template([conversation], **kwargs)
            except Exception as error:
                raise ValueError(f"{names[number]} cannot be processed: {error}") from error
        raise


def joined_texts(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Returns messages with the texts of their content parts joined, as the templates of language models take them."""
    joined = []
    for message in messages:
        parts = _parts(message)
        if wrong := [part["type"] for part in parts if part["type"] != "text"]:
            raise ValueError(f"{name} has a part of type {wrong[0]!r}, but the model only reads text.")
        joined.append(message | {"content": "".join(part["text"] for part in parts)} if parts else message)
    return joined


def _messages(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    if row.get("messages") is None:
        raise ValueError(f"{name} lacks `messages`: its fields are {list(row)}.")
    messages = row["messages"]
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{name}: `messages` must be a list of messages, got {type(messages)}.")
    if not messages:
        raise ValueError(f"{name}: `messages` is empty: give at least one message, or drop the row.")
    for i, message in enumerate(messages):
        _check_message(message, f"{name}: messages[{i}]")
    return list(messages)


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be a dict with `role` and `content`, got {type(message)}.")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(f"{name} lacks `role`: add 'user', 'assistant' or another one of the chat template.")
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(f"{name} lacks `content`: its fields are {list(message)}.")
    content = message.get("content")
    if isinstance(content, str):
        check_encodable(content, f"{name}.content")
    elif content is not None and not isinstance(content, list | tuple):
        raise ValueError(f"{name}.content must be a string or a list of parts, got {type(content)}.")
    for i, part in enumerate(_parts(message)):
        _check_part(part, f"{name}.content[{i}]")


def _check_part(part: Any, name: str) -> None:
    if not isinstance(part, dict):
        raise ValueError(f"{name} must be a dict, such as {{'type': 'text', 'text': …}}, got {part!r}.")
    if not isinstance(part.get("type"), str):
        raise ValueError(f"{name} lacks `type`: add 'text' or 'image'.")
    if part["type"] == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{name}.text must be a string, got {part.get('text')!r}.")
        check_encodable(part["text"], f"{name}.text")


def _images(images: Any, name: str) -> list[Any]:
    """Returns the images of a row without entries that are `None`."""
    is_batch = getattr(images, "ndim", 0) == 4
    if images is not None and not isinstance(images, list | tuple) and not is_batch:
        raise ValueError(
            f"{name}: `images` must be a list of images, got {type(images)}: put a single image in a list."
        )
    return [image for image in ([] if images is None else images) if image is not None]


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the parts of the content of a message, or an empty list if the content is plain text."""
    content = message.get("content")
    return [] if content is None or isinstance(content, str) else list(content)


def _is_placeholder(part: dict[str, Any]) -> bool:
    return part["type"] == "image" and all(part.get(key) is None for key in IMAGE_KEYS)


def _filled(part: dict[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    """Returns a content part. If it is a placeholder, it gets the next image."""
    if part["type"] != "image":
        return part
    if _is_placeholder(part):
        part = part | {"image": next(images)}
    # Parts from a table have the keys of all parts, with `None` as value. Transformers' processors do not take `Path`.
    return {key: str(value) if isinstance(value, Path) else value for key, value in part.items() if value is not None}
