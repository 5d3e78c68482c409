"""The images and videos of a row: in columns, and in parts of messages."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.image_utils import PIL

from ...checks import shown
from .bad_rows import MISSING_FIELD, WRONG_TYPE, RowFault

IMAGE_FIELDS = ("images", "image", "file_names", "file_name")
VIDEO_FIELDS = ("videos", "video")
# Folders of videos name their files in these fields, like folders of images.
_FILE_FIELDS = ("file_names", "file_name")
_VIDEO_FILES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts")
_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
_PART_VIDEO_KEYS = ("video", "path", "url")
# Names of fields whose texts can be paths of images and videos.
_NAMES_OF_MEDIA = re.compile("image|img|picture|photo|video|file|path", re.IGNORECASE)


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row with `None` in place of fields that are NaN, which is how pandas writes missing values."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def check_other_fields(row: Mapping[str, Any]) -> None:
    """
    Checks that a row without images and videos has none in a field that is not read, such as `img`.

    Raises:
        RowFault: If it has one.
    """
    if any(field in row for field in (*IMAGE_FIELDS, *VIDEO_FIELDS)):
        return
    for field, value in row.items():
        if any(_is_image_or_video(item, field) for item in _listed(value)):
            raise RowFault(
                MISSING_FIELD,
                f"the row has an image or a video in {field!r}, which would be lost: rename the field to 'image', "
                "'images', 'video' or 'videos', or remove it.",
            )


def column_images(row: Mapping[str, Any]) -> list[Any]:
    """Returns the images in the columns of a row. An image that is `None` is not there."""
    field = _only_field(row, IMAGE_FIELDS, "images")
    if field is None:
        return []
    images = [image for image in _listed(row[field]) if image is not None]
    return [image for image in images if not _is_video_file(image)] if field in _FILE_FIELDS else images


def column_videos(row: Mapping[str, Any]) -> list[Any]:
    """
    Returns the videos in the columns of a row. A video that is `None` is not there. A list in `video` is one video, as
    the list of its frames, unless it consists of files of videos.
    """
    named = [
        file for field in _FILE_FIELDS for file in _listed(row.get(field)) if file is not None and _is_video_file(file)
    ]
    field = _only_field(row, VIDEO_FIELDS, "videos")
    if field is None:
        return named
    if named:
        raise RowFault(WRONG_TYPE, f"the row has videos in {field!r} and in 'file_name': use one of these fields.")
    value = row[field]
    is_one = field == "video" and not (_listed(value) and all(map(_is_video_file, _listed(value))))
    return [value] if is_one else [video for video in _listed(value) if video is not None]


def video_of_part(part: Mapping[str, Any], name: str) -> Any:
    """
    Returns the video that a part of a message of type `"video"` contains, or `None` if it contains none.

    Raises:
        RowFault: If the part has further fields.
    """
    given = {key: value for key, value in part.items() if value is not None and key not in ("type", "text")}
    video = next((given.pop(key) for key in _PART_VIDEO_KEYS if key in given), None)
    fps = given.pop("fps", None)
    if given:
        raise RowFault(
            WRONG_TYPE,
            f"{name} has the field {next(iter(given))!r}, which would be lost: set options for all videos in the "
            "processor of the model.",
        )
    if fps is None:
        return video
    if not isinstance(video, list | tuple):
        raise RowFault(
            WRONG_TYPE,
            f"{name} has `fps`, which is the frame rate of a video that is a list of frames, but its video is "
            f"{shown(video)}: set the number of frames per second to read in the processor of the model.",
        )
    return {"frames": list(video), "fps": fps}


def _only_field(row: Mapping[str, Any], fields: tuple[str, ...], what: str) -> str | None:
    """Returns the field of a row that is not null, or `None`. Raises `RowFault` if there are several."""
    given = [field for field in fields if row.get(field) is not None]
    if len(given) > 1:
        raise RowFault(WRONG_TYPE, f"the row has {what} in {given[0]!r} and in {given[1]!r}: use one of these fields.")
    return given[0] if given else None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_video_file(value: Any) -> bool:
    path = value.get("path") if isinstance(value, Mapping) else value
    return isinstance(path, str | os.PathLike) and Path(path).suffix.lower() in _VIDEO_FILES


def _is_image_or_video(value: Any, field: str) -> bool:
    if isinstance(value, PIL.Image.Image):
        return True
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or _is_image_or_video(value.get("path"), field)
    is_file = isinstance(value, str) and Path(value).suffix.lower() in (*_IMAGE_FILES, *_VIDEO_FILES)
    return is_file and _NAMES_OF_MEDIA.search(field) is not None
