"""Validation of rows: messages in the form that the collator takes, and images and videos that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checks import shown
from ...control_tokens import check_encodable
from .bad_rows import (
    EMPTY_ANSWER,
    MISSING_FILE,
    NO_ASSISTANT_TURN,
    TYPED_IMAGE_TOKEN,
    TYPED_VIDEO_TOKEN,
    UNKNOWN_ROLE,
    WRONG_NUMBER_OF_IMAGES,
    WRONG_TYPE,
    RowFault,
)
from .columns import check_other_fields, without_nan
from .formats import DataFormat
from .media_sources import check_image, check_video, image_source, video_source

ROLES = ("system", "user", "assistant")
# Tokens of common models. In a text, they would stand for an image or a video that the row does not have.
IMAGE_TOKENS = (
    "<image>",
    "<|image|>",
    "<|image_pad|>",
    "<image_soft_token>",
    "<start_of_image>",
    "<IMG_CONTEXT>",
    "[IMG]",
)
VIDEO_TOKENS = ("<video>", "<|video|>", "<|video_pad|>")


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
            Folder to which paths of images and videos are relative.

    Returns:
        `tuple[dict, list[tuple[int, int]]]`: The row, with `messages`, whose contents are lists of parts, `images`, a
        list of dicts with `bytes` or `path`, `videos`, a list of dicts (see
        [`~toolbox.data.media_sources.video_source`]), and `references`, the list of all right answers; and the width
        and height of each image.

    Raises:
        RowFault: If the row cannot be used. The images are decoded once to find out, and so are up to 32 frames of
            each video file.
    """
    if not isinstance(row, Mapping):
        raise RowFault(WRONG_TYPE, f"the row must be a dict, but got {shown(row)}.")
    row = without_nan(row)
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
    sources = [image_source(image, f"images[{i}]", image_root) for i, image in enumerate(images)]
    videos = [part["video"] for message in messages for part in message["content"] if part["type"] == "video"]
    if not images and not videos:
        check_other_fields(row)
    video_sources = [video_source(video, i, image_root) for i, video in enumerate(videos)]
    try:
        sizes = [check_image(source, i) for i, source in enumerate(sources)]
        for i, source in enumerate(video_sources):
            check_video(source, i)
    except RowFault as fault:
        if fault.kind != MISSING_FILE or format.name != "llava":
            raise
        # The images of such data are usually in another folder than the file.
        hint = "`image_root` (`--image-root`) names the folder to which the paths of the images are relative."
        raise RowFault(fault.kind, f"{fault.reason} {hint}") from fault.__cause__
    references = _references(row, format, messages)
    messages = [
        message | {"content": [{k: v for k, v in part.items() if k != "video"} for part in message["content"]]}
        for message in messages
    ]
    return {"messages": messages, "images": sources, "videos": video_sources, "references": references}, sizes


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
        if found := [token for token in VIDEO_TOKENS if token in text]:
            raise RowFault(
                TYPED_VIDEO_TOKEN,
                f"a text of messages[{number}] contains the video token {found[0]!r}: remove it, or use a content part "
                "{'type': 'video'} for a video.",
            )
    if role == "assistant" and not "".join(texts).strip():
        raise RowFault(EMPTY_ANSWER, f"the answer in messages[{number}] is empty: give a text, or drop the row.")
    if not message["content"]:
        raise RowFault(WRONG_TYPE, f"messages[{number}] has no content: give a text or an image.")
