"""
Rows of conversations with images and videos: checks them, puts images and videos at their placeholders and makes model
inputs of them. Error messages name the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ...control_tokens import check_encodable
from .videos import VIDEO_KEYS, read_videos

# Keys under which a content part of type "image" or "video" may contain its image or video.
IMAGE_KEYS = ("image", "url", "path", "base64")
_KEYS = {"image": IMAGE_KEYS, "video": VIDEO_KEYS}


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
    Returns the messages of a row, with every image and video at its placeholder.

    Args:
        row (`Mapping`):
            Row in the form that [`~toolbox.data.VisionLanguageCollator`] takes.
        number (`int`):
            Position of the row, for error messages about rows that do not know their source.

    Returns:
        `list[dict]`: Chat messages. A content part of type `"image"` or `"video"` that contains an image or a video
        keeps it.

    Raises:
        ValueError: If a field is missing or has a wrong type, if a text cannot be encoded as UTF-8, or if the number of
            images or videos differs from the number of their placeholders. The message names the row and the field.
    """
    name = row_name(row, number)
    if not isinstance(row, Mapping):
        raise ValueError(f"{name} must be a dict with `messages` and `images`, got {type(row)}.")
    messages = _messages(row, name)
    remaining = {"image": iter(_placed(_images(row.get("images"), name), "image", messages, name))}
    # Without the field `videos`, the processor decides what a place of a video is.
    if row.get("videos") is not None:
        remaining["video"] = iter(_placed(_videos(row["videos"], name), "video", messages, name))
    return [
        message | {"content": [_filled(part, remaining) for part in _parts(message)]} if _parts(message) else message
        for message in messages
    ]


def _placed(items: list[Any], kind: str, messages: list[dict[str, Any]], name: str) -> list[Any]:
    """Returns images or videos. Raises `ValueError` if their number is not that of their placeholders."""
    num_placeholders = sum(_is_placeholder(part, kind) for message in messages for part in _parts(message))
    if num_placeholders != len(items):
        article = "an image" if kind == "image" else "a video"
        raise ValueError(
            f"{name} has {len(items)} {kind}s in `{kind}s`, but {num_placeholders} placeholders in `messages` "
            f"(content parts of type '{kind}' that do not contain {article}): give one {kind} for each placeholder."
        )
    return items


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
        return _applied(processor, list(conversations.values()), kwargs)
    except ImportError:
        raise
    except Exception:
        # Processes the conversations one by one to find the one that failed.
        for number, conversation in conversations.items():
            try:
                _applied(processor, [conversation], kwargs)
            except Exception as error:
                raise ValueError(f"{names[number]} cannot be processed: {error}") from error
        raise


def _applied(
    processor: ProcessorMixin | PreTrainedTokenizerBase, conversations: list[list[dict[str, Any]]], kwargs: Any
) -> BatchFeature:
    conversations, options = read_videos(processor, conversations)
    if options:
        kwargs = kwargs | {"processor_kwargs": kwargs["processor_kwargs"] | options}
    return BatchFeature(dict(processor.apply_chat_template(conversations, **kwargs)))


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


def _videos(videos: Any, name: str) -> list[Any]:
    """Returns the videos of a row without entries that are `None`."""
    if not isinstance(videos, list | tuple):
        raise ValueError(
            f"{name}: `videos` must be a list of videos, got {type(videos)}: put a single video in a list."
        )
    return [video for video in videos if video is not None]


def _is_placeholder(part: dict[str, Any], kind: str) -> bool:
    return part["type"] == kind and all(part.get(key) is None for key in _KEYS[kind])


def _filled(part: dict[str, Any], remaining: Mapping[str, Iterator[Any]]) -> dict[str, Any]:
    """Returns a content part. If it is a placeholder, it gets the next image or video."""
    kind = part["type"]
    if kind not in _KEYS:
        return part
    if kind in remaining and _is_placeholder(part, kind):
        part = part | {kind: next(remaining[kind])}
    # Parts from a table have the keys of all parts, with `None` as value. Transformers' processors do not take `Path`.
    return {key: str(value) if isinstance(value, Path) else value for key, value in part.items() if value is not None}
