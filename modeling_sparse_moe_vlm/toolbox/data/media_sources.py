"""Images and videos of rows as files or bytes, and the check that they can be read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from transformers.image_utils import PIL
from transformers.utils import is_numpy_array

from ...checks import shown
from ...image_reading import read_images
from ...video_reading import FrameSampling, read_frames, read_video
from .bad_rows import BROKEN_IMAGE, BROKEN_VIDEO, LARGE_IMAGE, MISSING_FILE, WRONG_TYPE, RowFault

# The frames of a video that are decoded to check it: those that processors with default options read.
_CHECKED = FrameSampling(max_frames=32, fps=1.0)


def image_source(image: Any, name: str, root: str | Path | None, what: str = "image") -> Any:
    """
    Returns an image or the file of a video as a dict with `bytes` or a `path`, or as the PIL image that it is.

    Args:
        image (`Any`):
            Path, bytes, dict with one of them, or PIL image.
        name (`str`):
            Name of the image in error messages, such as `"images[0]"`.
        root (`str` or `Path`, *optional*):
            Folder to which paths are relative.
        what (`str`, *optional*, defaults to `"image"`):
            `"image"` or `"video"`, for error messages.

    Raises:
        RowFault: If it has another type or is a URL. It need not exist.
    """
    if isinstance(image, PIL.Image.Image) and what == "image":
        return image
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        if not isinstance(image["bytes"], bytes):
            raise RowFault(WRONG_TYPE, f"{name}['bytes'] must be bytes, but got {shown(image['bytes'])}.")
        # Files in an archive have a name that is not a path.
        return {"bytes": image["bytes"], "path": None}
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        forms = "a path, bytes, or a dict with one of them"
        forms += "" if what == "image" else ", or a list of frames"
        raise RowFault(WRONG_TYPE, f"{name} must be {forms}, but got {shown(image)}.")
    path = os.fspath(path)
    if path.lower().startswith(("http://", "https://", "ftp://", "data:")):
        raise RowFault(
            WRONG_TYPE, f"{name} is the URL {shown(path)}: download the {what}, and give the path of the file."
        )
    if "://" in path and not path.startswith("file://"):
        return {"bytes": _remote_bytes(path, name, what), "path": None}
    full = path.removeprefix("file://") if root is None else os.path.join(root, path.removeprefix("file://"))
    return {"bytes": None, "path": full}


def _remote_bytes(path: str, name: str, what: str) -> bytes:
    """Reads a file of a streamed dataset, such as `hf://…` or `zip://…::…`."""
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise RowFault(MISSING_FILE, f"{name}: there is no file {path!r}.") from error
    except Exception as error:  # unknown protocols, and each protocol raises its own types
        reason = " ".join(str(error).split())
        raise RowFault(
            MISSING_FILE,
            f"{name}: {path!r} cannot be read ({reason}): download the {what}, and give the path of the file.",
        ) from error


def check_image(source: Any, number: int) -> tuple[int, int]:
    """Decodes an image of a row and returns its width and height. Raises `RowFault` if it cannot be read."""
    return _read_image(source, f"images[{number}]").size


def _read_image(source: Any, name: str) -> Any:
    path = _existing_path(source, name)
    try:
        (image,) = read_images([source])
    except ValueError as error:
        kind = LARGE_IMAGE if "absurdly large" in str(error) else BROKEN_IMAGE
        where = "" if path is None else f" ({path})"
        raise RowFault(kind, f"{str(error).replace('images[0]', f'{name}{where}', 1)}") from error
    return image


def _existing_path(source: Any, name: str) -> str | None:
    path = source.get("path") if isinstance(source, dict) else None
    if path is not None and not os.path.isfile(path):
        raise RowFault(MISSING_FILE, f"{name}: there is no file {path!r}.")
    return path


def video_source(video: Any, number: int, root: str | Path | None) -> dict[str, Any]:
    """
    Returns a video of a row as a dict with `path` or `bytes` of a file, or with `frames` (each as [`image_source`]
    returns it) and possibly `fps`.

    Args:
        video (`Any`):
            Path, bytes, dict with one of them, list of frames, array with 4 dimensions, also as nested lists, or dict
            with `frames` and possibly `fps`, their frame rate.
        number (`int`):
            Number of the video in its row.
        root (`str` or `Path`, *optional*):
            Folder to which paths are relative.

    Raises:
        RowFault: If it has another type, has no frames, or is a URL. The message names the video.
    """
    name = f"videos[{number}]"
    fps = None
    if isinstance(video, Mapping) and video.get("frames") is not None:
        further = [key for key, value in video.items() if value is not None and key not in ("frames", "fps")]
        if further:
            raise RowFault(WRONG_TYPE, f"{name} has the field {further[0]!r} besides `frames`: remove one of them.")
        fps, video = video.get("fps"), video["frames"]
        if fps is not None and not (type(fps) in (int, float) and 0 < fps < float("inf")):
            raise RowFault(WRONG_TYPE, f"{name}['fps'] must be a number of more than 0, but got {shown(fps)}.")
    if not isinstance(video, list | tuple) and not is_numpy_array(video):
        return image_source(video, name, root, "video")
    if len(video) == 0:
        raise RowFault(WRONG_TYPE, f"{name} has no frames: give at least one, or drop the row.")
    names = [f"{name}, frame {index}" for index in range(len(video))]
    if all(isinstance(frame, list | tuple) or is_numpy_array(frame) for frame in video):
        try:
            frames = read_frames([np.asarray(frame) for frame in video], names)
        except ValueError as error:
            reason = str(error) if str(error).startswith(name) else f"{name} cannot be read: {error}"
            raise RowFault(BROKEN_VIDEO, reason) from error
    else:
        frames = [image_source(frame, own, root) for frame, own in zip(video, names, strict=True)]
    return {"frames": frames, "fps": None if fps is None else float(fps)}


def check_files(source: dict[str, Any], number: int) -> None:
    """Raises `RowFault` if a file of a video is missing: the video itself, or one of its frames."""
    name = f"videos[{number}]"
    _existing_path(source, name)
    for index, frame in enumerate(source.get("frames") or []):
        _existing_path(frame, f"{name}, frame {index}")


def check_video(source: dict[str, Any], number: int) -> None:
    """Decodes some frames of a video of a row. Raises `RowFault` if it cannot be read."""
    name = f"videos[{number}]"
    if source.get("frames") is not None:
        sizes = sorted({_read_image(frame, f"{name}, frame {i}").size for i, frame in enumerate(source["frames"])})
        if len(sizes) > 1:
            raise RowFault(BROKEN_VIDEO, f"{name} has frames of different sizes {sizes}: resize them to one size.")
        return
    _existing_path(source, name)
    try:
        read_video(source, name, _CHECKED)
    except ValueError as error:
        raise RowFault(BROKEN_VIDEO, str(error)) from error
