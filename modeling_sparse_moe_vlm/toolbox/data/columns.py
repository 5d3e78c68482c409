"""The images and videos of a row: in columns, and in parts of messages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checks import shown
from .bad_rows import WRONG_TYPE, RowFault

IMAGE_FIELDS = ("images", "image", "file_names", "file_name")
VIDEO_FIELDS = ("videos", "video")
# Folders of videos name their files in these fields, like folders of images.
_FILE_FIELDS = ("file_names", "file_name")
_VIDEO_FILES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts")
_PART_VIDEO_KEYS = ("video", "path", "url")


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
