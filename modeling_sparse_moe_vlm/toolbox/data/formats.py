"""Formats of data: recognises the format of rows by their fields, and turns a row into messages, images and videos."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checks import shown
from .bad_rows import (
    EMPTY_ANSWER,
    MISSING_FIELD,
    NO_ASSISTANT_TURN,
    UNKNOWN_ROLE,
    WRONG_NUMBER_OF_VIDEOS,
    WRONG_TYPE,
    RowFault,
)
from .columns import IMAGE_FIELDS, VIDEO_FIELDS, column_images, column_videos, video_of_part

CAPTION_PROMPT = "Describe the image."
VIDEO_CAPTION_PROMPT = "Describe the video."
# LLaVA marks the places of images and videos in texts with them.
LLAVA_IMAGE_TOKEN, LLAVA_VIDEO_TOKEN = "<image>", "<video>"
CAPTION_FIELDS = ("caption", "captions", "text")
ANSWER_FIELDS = ("answer", "multiple_choice_answer", "answers")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PART_IMAGE_KEYS = ("image", "path", "url", "image_url")

Messages = list[dict[str, Any]]
Contents = tuple[Messages, list[Any]]


@dataclass(frozen=True)
class DataFormat:
    """
    A format of data.

    Args:
        name (`str`):
            Its name.
        fields (`str`):
            The fields of its rows, in words.
        fits (`Callable[[Collection[str]], bool]`):
            Returns whether rows with these fields have the format.
        convert (`Callable[[Mapping], tuple[list, list]]`):
            Returns the messages and the images of a row. The content of each message is a list of parts, in which
            `{"type": "image"}` is the place of the next image, and `{"type": "video", "video": …}` contains a video.
        references (`Callable[[Mapping], list[str]]`, *optional*):
            Returns all right answers of a row. By default, the only one is the text of the last assistant turn.
    """

    name: str
    fields: str
    fits: Callable[[Collection[str]], bool]
    convert: Callable[[Mapping[str, Any]], Contents]
    references: Callable[[Mapping[str, Any]], list[str]] | None = None


def recognise_format(fields: Collection[str], name: str) -> DataFormat:
    """
    Recognises the format of rows.

    Args:
        fields (`Collection[str]`):
            The fields of the rows.
        name (`str`):
            Name of the data in error messages.

    Returns:
        `DataFormat`: The format.

    Raises:
        ValueError: If the fields fit no format, or several.
    """
    fitting = [format for format in FORMATS.values() if format.fits(fields)]
    # A question can come with a field `text`, such as its context.
    if len(fitting) > 1:
        fitting = [format for format in fitting if format.name != "captions"]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"the format of {name} is ambiguous: its fields {sorted(fields)} fit "
            f"{' and '.join(format.name for format in fitting)}. Name one of them as the format."
        )
    known = "; ".join(f"{format.name} ({format.fields})" for format in FORMATS.values())
    raise ValueError(
        f"the format of {name} is not recognised: its fields are {sorted(fields)}. Known formats: {known}."
    )


def find_format(name: str) -> DataFormat:
    """Returns the format with a name. Raises `ValueError` if there is none."""
    if name not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, but got {name!r}.")
    return FORMATS[name]


def most_frequent_answer(answers: Sequence[str]) -> str:
    """Returns the answer that occurs most often. Among equally frequent answers, returns the first."""
    return Counter(answers).most_common(1)[0][0]


# ---------------------------------------------------------------------------------------------------- the formats


def _from_messages(row: Mapping[str, Any]) -> Contents:
    _check_tools(row)
    messages, inside = _read_messages(_field(row, "messages"), "messages")
    return _with_columns(messages, inside, row, row["messages"])


def _from_prompt_completion(row: Mapping[str, Any]) -> Contents:
    _check_tools(row)
    messages: Messages = []
    inside: list[Any] = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        value = _field(row, field)
        if isinstance(value, str):
            messages.append({"role": role, "content": [_text(value)]})
        else:
            read, images = _read_messages(value, field)
            messages += read
            inside += images
            if role == "assistant" and all(message["role"] != role for message in read):
                raise RowFault(NO_ASSISTANT_TURN, "`completion` has no assistant turn, so there is nothing to learn.")
    return _with_columns(messages, inside, row, row["prompt"])


def _from_conversations(row: Mapping[str, Any]) -> Contents:
    _check_tools(row)
    messages: Messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": [_text(_string(row["system"], "system"))]})
    images, videos = column_images(row), column_videos(row)
    for i, turn in enumerate(_list_field(row, "conversations")):
        name = f"conversations[{i}]"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise RowFault(WRONG_TYPE, f"{name} must be a dict with `from` and `value`, but got {shown(turn)}.")
        if turn.get("weight") not in (None, 1):
            raise RowFault(
                WRONG_TYPE,
                f"{name} has the weight {shown(turn['weight'])}, which would be lost: all answers are learned with the "
                "same weight. Remove it.",
            )
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(map(repr, _SHAREGPT_ROLES))
            raise RowFault(UNKNOWN_ROLE, f"{name} has the unknown role {turn['from']!r}: use one of {known}.")
        value = _string(turn["value"], f"{name}.value")
        messages.append({"role": role, "content": _split_at_places(value) if role == "user" else [_text(value)]})
    if videos and not images and not any(part["type"] == "video" for m in messages for part in m["content"]):
        # Data for LLaVA also marks the places of videos with "<image>".
        for message in messages:
            message["content"] = [{"type": "video"} if part["type"] == "image" else part for part in message["content"]]
    return _with_videos(messages, videos), images


def _from_texts(row: Mapping[str, Any]) -> Contents:
    messages: Messages = []
    for i, turn in enumerate(_list_field(row, "texts")):
        name = f"texts[{i}]"
        if not isinstance(turn, Mapping) or "user" not in turn or "assistant" not in turn:
            raise RowFault(WRONG_TYPE, f"{name} must be a dict with `user` and `assistant`, but got {shown(turn)}.")
        if turn.get("system") is not None:
            messages.append({"role": "system", "content": [_text(_string(turn["system"], f"{name}.system"))]})
        messages += [
            {"role": role, "content": [_text(_string(turn[role], f"{name}.{role}"))]} for role in ("user", "assistant")
        ]
    return _places_first(messages, row)


def _from_vqa(row: Mapping[str, Any]) -> Contents:
    question = _string(_field(row, "question"), "question")
    return _places_first([_user(question), _assistant(_answer(row))], row)


def _vqa_references(row: Mapping[str, Any]) -> list[str]:
    """Returns the answers of all annotators if the row has them, and its answer otherwise."""
    field = "answers" if row.get("answers") else _present(row, ANSWER_FIELDS)
    return _texts(_field(row, field), field)


def _from_captions(row: Mapping[str, Any]) -> Contents:
    captions = _captions(row)
    if not column_images(row) and not column_videos(row):
        raise RowFault(MISSING_FIELD, "the row has a caption, but no image or video: add one, or drop the row.")
    prompt = VIDEO_CAPTION_PROMPT if column_videos(row) and not column_images(row) else CAPTION_PROMPT
    return _places_first([_user(prompt), _assistant(captions[0] if captions else "")], row)


def _captions(row: Mapping[str, Any]) -> list[str]:
    field = _present(row, CAPTION_FIELDS)
    value = _field(row, field)
    if field == "text" or not isinstance(value, list | tuple):
        return [_string(value, field)]
    captions = [_string(caption, f"{field}[{i}]") for i, caption in enumerate(value)]
    for i, caption in enumerate(captions):
        if not caption.strip():
            raise RowFault(EMPTY_ANSWER, f"the caption in `{field}[{i}]` is empty: give a text, or remove it.")
    return captions


FORMATS = {
    format.name: format
    for format in (
        DataFormat(
            "messages",
            "`messages`, with images and videos inside or in `images` and `videos`",
            lambda fields: "messages" in fields,
            _from_messages,
        ),
        DataFormat(
            "prompt-completion",
            "`prompt` and `completion`",
            lambda fields: {"prompt", "completion"} <= set(fields),
            _from_prompt_completion,
        ),
        DataFormat(
            "llava",
            "`conversations`, and `image` or `video`",
            lambda fields: "conversations" in fields,
            _from_conversations,
        ),
        DataFormat("texts", "`texts`, and `images` or `videos`", lambda fields: "texts" in fields, _from_texts),
        DataFormat(
            "vqa",
            "`image` or `video`, `question`, and `answer` or `answers`",
            lambda fields: "question" in fields and any(field in fields for field in ANSWER_FIELDS),
            _from_vqa,
            _vqa_references,
        ),
        DataFormat(
            "captions",
            "`image`, `video` or `file_name`, and `caption`, `captions` or `text`",
            lambda fields: (
                any(f in fields for f in (*IMAGE_FIELDS, *VIDEO_FIELDS)) and any(f in fields for f in CAPTION_FIELDS)
            ),
            _from_captions,
            _captions,
        ),
    )
}


# ---------------------------------------------------------------------------------------------------- parts of rows


def _field(row: Mapping[str, Any], field: str) -> Any:
    if row.get(field) is None:
        reason = "it is null" if field in row else f"its fields are {list(row)}"
        raise RowFault(MISSING_FIELD, f"the row lacks `{field}`: {reason}.")
    return row[field]


def _list_field(row: Mapping[str, Any], field: str) -> list[Any]:
    value = _as_list(_field(row, field))
    if not isinstance(value, list | tuple):
        raise RowFault(WRONG_TYPE, f"`{field}` must be a list, but got {shown(value)}.")
    return list(value)


def _as_list(value: Any) -> Any:
    """
    Returns a list of dicts for a dict of lists of equal length, which is how `datasets` stores `Sequence({…})`. Other
    values are returned as they are.
    """
    if not isinstance(value, Mapping) or not value or not all(isinstance(item, list) for item in value.values()):
        return value
    if len({len(item) for item in value.values()}) > 1:
        return value
    return [dict(zip(value, items)) for items in zip(*value.values())]


def _check_tools(row: Mapping[str, Any]) -> None:
    if row.get("tools"):
        raise RowFault(WRONG_TYPE, "the row has `tools`, which would be lost: calls of tools are not supported.")


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowFault(WRONG_TYPE, f"`{name}` must be a string, but got {shown(value)}.")
    return value


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [_text(text)]}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [_text(text)]}


def _answer(row: Mapping[str, Any]) -> str:
    """Returns the answer of a question: the most frequent one if there are several."""
    field = _present(row, ANSWER_FIELDS)
    answers = _texts(_field(row, field), field)
    return most_frequent_answer(answers) if answers else ""


def _present(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Returns the first of the fields that the row has, or the first of all if it has none."""
    return next((field for field in fields if row.get(field) is not None), fields[0])


def _texts(value: Any, field: str) -> list[str]:
    """Returns the texts of a field that has one or several."""
    value = _as_list(value)
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise RowFault(WRONG_TYPE, f"`{field}` must be a text or a finite number, but got {value}.")
        return [str(value).lower() if isinstance(value, bool) else str(value)]
    if not isinstance(value, list | tuple):
        return [_string(value, field)]
    # VQAv2 gives each answer as a dict with the annotator.
    return [
        _string(item.get("answer") if isinstance(item, Mapping) else item, f"{field}[{i}]")
        for i, item in enumerate(value)
    ]


def _places_first(messages: Messages, row: Mapping[str, Any]) -> Contents:
    """Puts the places of all images and all videos before the text of the first user turn, as TRL does with images."""
    images, videos = column_images(row), column_videos(row)
    places = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in videos)]
    for i, message in enumerate(messages):
        if message["role"] == "user":
            changed = message | {"content": [*places, *message["content"]]}
            messages = [*messages[:i], changed, *messages[i + 1 :]]
            break
    return _with_videos(messages, videos), images


def _with_columns(messages: Messages, inside: list[Any], row: Mapping[str, Any], given: Any) -> Contents:
    """
    Returns messages with all images and videos of a row, in order: each place without one gets the next one of the
    column.

    `inside` has the images of the parts of type `"image"`, with `None` for those that contain none. `given` are the
    messages of the row as it contains them, or the text of its prompt.
    """
    given = _as_list(given)
    # TRL only adds the places of images if the contents are strings.
    if isinstance(given, str) or all(isinstance(message["content"], str) for message in given):
        return _places_first(messages, row)
    images = column_images(row)
    messages = _with_videos(messages, column_videos(row))
    if inside.count(None) != len(images):  # the number of images is wrong, which the validation reports
        return messages, [image for image in inside if image is not None] + images
    remaining = iter(images)
    return messages, [next(remaining) if image is None else image for image in inside]


def _with_videos(messages: Messages, videos: list[Any]) -> Messages:
    """
    Puts the videos of a row into the parts of type `"video"` that contain none.

    Raises:
        RowFault: If the number of videos differs from the number of these parts.
    """
    places = [part for message in messages for part in message["content"] if part["type"] == "video"]
    num_inside = sum("video" in part for part in places)
    if len(places) - num_inside != len(videos):
        raise RowFault(
            WRONG_NUMBER_OF_VIDEOS,
            f"the row has {num_inside + len(videos)} videos, but {len(places)} placeholders for videos: give one video "
            "for each placeholder.",
        )
    remaining = iter(videos)
    return [
        message
        | {
            "content": [
                part | {"video": next(remaining)} if part["type"] == "video" and "video" not in part else part
                for part in message["content"]
            ]
        }
        for message in messages
    ]


def _read_messages(value: Any, name: str) -> tuple[Messages, list[Any]]:
    """Returns messages with contents as lists of parts, and the images inside of them (`None` for a place only)."""
    value = _as_list(value)
    if not isinstance(value, list | tuple):
        raise RowFault(WRONG_TYPE, f"`{name}` must be a list of messages, but got {shown(value)}.")
    messages, images = [], []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise RowFault(WRONG_TYPE, f"{where} must be a dict with `role` and `content`, but got {shown(message)}.")
        if further := [key for key, item in message.items() if key not in ("role", "content") and item is not None]:
            raise RowFault(
                WRONG_TYPE,
                f"{where} has the field {further[0]!r}, which would be lost: only `role` and `content` are read.",
            )
        content = message["content"]
        if not isinstance(content, str | list | tuple):
            raise RowFault(
                WRONG_TYPE, f"{where}.content must be a string or a list of parts, but got {shown(content)}."
            )
        parts = []
        for j, part in enumerate([_text(content)] if isinstance(content, str) else content):
            part, image = _read_part(part, f"{where}.content[{j}]")
            parts.append(part)
            if part["type"] == "image":
                images.append(image)
        messages.append({"role": message["role"], "content": parts})
    return messages, images


def _read_part(part: Any, name: str) -> tuple[dict[str, Any], Any]:
    """Returns a part of a content, and the image that it contains, if any."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return _text(_string(part.get("text"), f"{name}.text")), None
    if kind in ("image", "image_url"):
        image = next((part[key] for key in _PART_IMAGE_KEYS if part.get(key) is not None), None)
        if isinstance(image, Mapping) and "url" in image:  # as in OpenAI's API
            image = image["url"]
        return {"type": "image"}, image
    if kind == "video":
        video = video_of_part(part, name)
        return {"type": "video"} | ({} if video is None else {"video": video}), None
    raise RowFault(
        WRONG_TYPE,
        f"{name} must be a dict of type 'text', 'image' or 'video', such as {_text('…')}, but got {shown(part)}.",
    )


def _split_at_places(text: str) -> list[dict[str, Any]]:
    """Returns the parts of a text of LLaVA: texts, and the places of images and videos between them."""
    kinds = {LLAVA_IMAGE_TOKEN: "image", LLAVA_VIDEO_TOKEN: "video"}
    parts: list[dict[str, Any]] = []
    for piece in re.split(f"({'|'.join(kinds)})", text):
        if piece in kinds:
            parts.append({"type": kinds[piece]})
        elif piece := piece.strip("\n"):
            parts.append(_text(piece))
    return parts
