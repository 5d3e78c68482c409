"""Validation of rows: messages in the form that the collator takes, and images that can be read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from transformers.image_utils import PIL

from ...checks import shown
from ...control_tokens import check_encodable
from ...image_reading import read_images
from .bad_rows import (
    BROKEN_IMAGE,
    EMPTY_ANSWER,
    LARGE_IMAGE,
    MISSING_FILE,
    NO_ASSISTANT_TURN,
    TYPED_IMAGE_TOKEN,
    UNKNOWN_ROLE,
    WRONG_NUMBER_OF_IMAGES,
    WRONG_TYPE,
    RowFault,
)
from .formats import DataFormat

ROLES = ("system", "user", "assistant")
# The image tokens of common models. In a text, they would stand for an image that the row does not have.
IMAGE_TOKENS = (
    "<image>",
    "<|image|>",
    "<|image_pad|>",
    "<image_soft_token>",
    "<start_of_image>",
    "<IMG_CONTEXT>",
    "[IMG]",
)


def validated_row(
    row: Any, format: DataFormat, image_root: str | Path | None = None
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """
    Turns a row of any format into the form that [`~toolbox.data.VisionLanguageCollator`] takes, and validates it.

    Args:
        row (`Any`):
            The row.
        format (`DataFormat`):
            Its format.
        image_root (`str` or `Path`, *optional*):
            Folder to which paths of images are relative.

    Returns:
        `tuple[dict, list[tuple[int, int]]]`: The row, with `messages`, whose contents are lists of parts, `images`, a
        list of dicts with `bytes` or `path`, and `references`, the list of all right answers; and the width and height
        of each image.

    Raises:
        RowFault: If the row cannot be used. The images are decoded once to find out.
    """
    if not isinstance(row, Mapping):
        raise RowFault(WRONG_TYPE, f"the row must be a dict, but got {shown(row)}.")
    messages, images = format.convert(row)
    for i, message in enumerate(messages):
        _check_message(message, i)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowFault(NO_ASSISTANT_TURN, "the row has no assistant turn, so there is nothing to learn from it.")
    num_places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_places != len(images):
        raise RowFault(
            WRONG_NUMBER_OF_IMAGES,
            f"the row has {len(images)} images, but {num_places} placeholders for images: give one image for each "
            "placeholder.",
        )
    sources = [_image_source(image, i, image_root) for i, image in enumerate(images)]
    sizes = [check_image(source, i) for i, source in enumerate(sources)]
    return {"messages": messages, "images": sources, "references": _references(row, format, messages)}, sizes


def _references(row: Mapping[str, Any], format: DataFormat, messages: list[dict[str, Any]]) -> list[str]:
    """Returns the right answers of a row, by default the text of its last assistant turn."""
    if format.references is None:
        last = [message for message in messages if message["role"] == "assistant"][-1]
        return ["".join(part["text"] for part in last["content"] if part["type"] == "text")]
    references = format.references(row)
    for i, reference in enumerate(references):
        _check_text(reference, f"references[{i}]")
    return references


def _check_text(text: str, name: str) -> None:
    try:
        check_encodable(text, name)
    except ValueError as error:
        raise RowFault(WRONG_TYPE, str(error)) from None


def _check_message(message: dict[str, Any], number: int) -> None:
    role = message["role"]
    if role not in ROLES:
        known = ", ".join(map(repr, ROLES))
        raise RowFault(UNKNOWN_ROLE, f"messages[{number}] has the unknown role {role!r}: use one of {known}.")
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    for text in texts:
        _check_text(text, f"messages[{number}]")
        if found := [token for token in IMAGE_TOKENS if token in text]:
            raise RowFault(
                TYPED_IMAGE_TOKEN,
                f"a text of messages[{number}] contains the image token {found[0]!r}: remove it, or use a content part "
                "{'type': 'image'} for an image.",
            )
    if role == "assistant" and not "".join(texts).strip():
        raise RowFault(EMPTY_ANSWER, f"the answer in messages[{number}] is empty: give a text, or drop the row.")
    if not message["content"]:
        raise RowFault(WRONG_TYPE, f"messages[{number}] has no content: give a text or an image.")


def _image_source(image: Any, number: int, root: str | Path | None) -> Any:
    """Returns an image as a dict with `bytes` or an existing `path`, or as the PIL image that it is."""
    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        if not isinstance(image["bytes"], bytes):
            raise RowFault(WRONG_TYPE, f"images[{number}]['bytes'] must be bytes, but got {shown(image['bytes'])}.")
        # Files in an archive have a name that is not a path.
        return {"bytes": image["bytes"], "path": None}
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise RowFault(
            WRONG_TYPE, f"images[{number}] must be a path, bytes, or a dict with one of them, but got {shown(image)}."
        )
    path = os.fspath(path)
    if path.startswith(("http://", "https://", "data:")):
        raise RowFault(
            WRONG_TYPE, f"images[{number}] is the URL {shown(path)}: download the image, and give the path of the file."
        )
    if "://" in path and not path.startswith("file://"):
        return {"bytes": _remote_bytes(path, number), "path": None}
    full = path.removeprefix("file://") if root is None else os.path.join(root, path.removeprefix("file://"))
    return {"bytes": None, "path": full}


def _remote_bytes(path: str, number: int) -> bytes:
    """Reads a file of a streamed dataset, such as `hf://…` or `zip://…::…`."""
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise RowFault(MISSING_FILE, f"images[{number}]: there is no file {path!r}.") from error


def check_image(source: Any, number: int) -> tuple[int, int]:
    """Decodes an image of a row and returns its width and height. Raises `RowFault` if it cannot be read."""
    path = source.get("path") if isinstance(source, dict) else None
    if path is not None and not os.path.isfile(path):
        raise RowFault(MISSING_FILE, f"images[{number}]: there is no file {path!r}.")
    try:
        (image,) = read_images([source])
    except ValueError as error:
        kind = LARGE_IMAGE if "absurdly large" in str(error) else BROKEN_IMAGE
        where = "" if path is None else f" ({path})"
        raise RowFault(kind, f"{str(error).replace('images[0]', f'images[{number}]{where}', 1)}") from error
    return image.size
