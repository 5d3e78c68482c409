"""Reads videos as a limited number of frames with their times."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.image_utils import PIL, to_numpy_array
from transformers.utils import is_av_available, is_cv2_available, is_numpy_array, is_torch_tensor, to_numpy
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, load_video

from .checks import check, check_integer, check_number
from .image_reading import read_images
from .video_decoding import Decoded, decode_animation, decode_with_pyav, is_animation


@dataclass(frozen=True)
class FrameSampling:
    """
    Which frames of a video are read.

    Args:
        max_frames (`int`):
            Largest number of frames, unless `num_frames` is set.
        fps (`float`):
            Number of frames per second of video, if its frame rate is known and `num_frames` is not set.
        num_frames (`int`, *optional*):
            Number of frames, spread evenly over the video.
        do_sample (`bool`):
            Whether to choose frames. Otherwise, all frames are read.

    Raises:
        ValueError: If a value is invalid.
    """

    max_frames: int
    fps: float
    num_frames: int | None = None
    do_sample: bool = True

    def __post_init__(self) -> None:
        check_integer("max_frames", self.max_frames)
        check_number("video_fps", self.fps)
        check(self.fps > 0, f"`video_fps` must be more than 0, got {self.fps}.")
        if self.num_frames is not None:
            check_integer("num_frames", self.num_frames)

    def indices(self, metadata: VideoMetadata, **kwargs: Any) -> Any:
        """Returns the numbers of the frames to read, from 0, as an array of integers."""
        total = metadata.total_num_frames
        number = total
        if self.do_sample and self.num_frames is not None:
            number = self.num_frames
        elif self.do_sample:
            wanted = total if not metadata.fps else int(total * self.fps / metadata.fps)
            number = min(max(1, wanted), self.max_frames)
        return default_sample_indices_fn(metadata, num_frames=min(number, total))

    def num_read(self, total: int, fps: float | None, name: str) -> int:
        """Returns how many frames of a video with `total` frames are read. Raises `ValueError` if it has none."""
        check(total > 0, f"{name} has no frames.")
        _check_rate(fps, name)
        return len(self.indices(VideoMetadata(total_num_frames=total, fps=fps)))


@dataclass(frozen=True)
class Video:
    """
    The frames of a video that are read.

    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`):
            The frames, of type uint8.
        metadata (`VideoMetadata`):
            The frame rate, if it is known, and the numbers of the frames in the whole video.
    """

    frames: Any
    metadata: VideoMetadata


def split_videos(videos: Any) -> list[Any]:
    """
    Returns a flat list of videos.

    Args:
        videos (`Any`):
            A video, a list of videos, or a list with one entry per text: a video, a list of videos, or `None`. A video
            is a path, a URL, bytes, a dict, an array or tensor with 4 dimensions, or a list of frames. A list of paths
            is a list of videos, unless it is inside two other lists.

    Returns:
        `list[Any]`: The videos.

    Raises:
        ValueError: If something else is passed.
    """
    rows = [[row] if _is_video(row) else row or [] for row in _rows_of(videos)]
    return [video for row in rows for video in row]


def numbers_of_videos(videos: Any) -> list[Any]:
    """
    Returns which texts videos belong to, in the form of [`~conversation_checks.check_numbers`]: for each entry of
    `videos`, `None`, 1 for a video, or a list of as many 1 as there are videos.
    """
    return [row if row is None else 1 if _is_video(row) else [1] * len(row) for row in _rows_of(videos)]


def _rows_of(videos: Any) -> list[Any]:
    """Returns the entries of `videos`: videos, lists of videos, and `None`."""
    if _is_video(videos):
        return [videos]
    if _dimensions(videos) == 5:
        return list(videos)
    _check_rows(videos, "`videos`")
    rows = list(videos)
    for number, row in enumerate(rows):
        if row is not None and not _is_video(row):
            _check_rows(row, f"videos[{number}]")
    return rows


def _check_rows(value: Any, name: str) -> None:
    shown = f"an array of shape {tuple(value.shape)}" if _dimensions(value) is not None else f"of type {type(value)}"
    check(
        _dimensions(value) is None and isinstance(value, Iterable),
        f"{name} is not a video, but {shown}: pass a path, bytes, a dict, a list of frames, or an array with 4 "
        "dimensions, frames first.",
    )


def _check_rate(fps: Any, name: str) -> None:
    """Raises `ValueError` unless a frame rate is a number, or `None` or 0 for one that is not known."""
    if fps is not None:
        check_number(f"fps` of `{name}", fps)


def _dimensions(value: Any) -> int | None:
    return value.ndim if is_numpy_array(value) or is_torch_tensor(value) else None


def _is_video(value: Any) -> bool:
    if isinstance(value, (str, bytes, os.PathLike, Mapping)) or _dimensions(value) == 4:
        return True
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return isinstance(value[0], PIL.Image.Image) or _dimensions(value[0]) in (2, 3)


def read_video(source: Any, name: str, sampling: Any, metadata: Any = None) -> Video:
    """
    Reads some frames of a video.

    Args:
        source (`Any`):
            A path or URL, the bytes of a file, an array or tensor with 4 dimensions (frames first), a list of frames in
            any form that [`~image_reading.read_images`] takes, or a dict with `path`, `bytes` or `frames`, the latter
            possibly with their frame rate as `fps`. Pillow reads GIF, WebP and PNG animations. Other files need one of
            the packages `av` and `opencv-python`.
        name (`str`):
            Name of the video in error messages.
        sampling ([`FrameSampling`]):
            Which frames to read. Another object needs a method `indices`.
        metadata (`VideoMetadata` or `dict`, *optional*):
            Of frames: `fps`, and `frames_indices` if the frames have been chosen from a longer video.

    Returns:
        [`Video`]: The frames.

    Raises:
        ValueError: If the video has no frames, cannot be read, or has frames of different sizes. The message names
            the video.
        ImportError: If no package can decode the file.
    """
    given = {key: value for key, value in dict(metadata or {}).items() if value is not None}
    if isinstance(source, Mapping):
        # Rows of tables have all keys, with `None` for those that are missing.
        given |= {key: value for key, value in source.items() if value is not None}
        source = next((given[key] for key in ("frames", "bytes", "path") if key in given), None)
        check(source is not None, f"{name} must have `path`, `bytes` or `frames`, but its keys are {list(given)}.")
    if isinstance(source, (str, bytes, os.PathLike)):
        frames, fps, indices = _read_file(source if isinstance(source, bytes) else str(source), name, sampling)
    else:
        fps = given.get("fps")
        _check_rate(fps, name)
        check(len(source) > 0, f"{name} has no frames.")
        indices = sampling.indices(VideoMetadata(total_num_frames=len(source), fps=fps)).tolist()
        frames = [source[index] for index in indices]
        if "frames_indices" in given:
            check(
                len(given["frames_indices"]) == len(source),
                f"{name} has {len(source)} frames, but `frames_indices` has {len(given['frames_indices'])} entries.",
            )
            indices = [int(given["frames_indices"][index]) for index in indices]
    images = read_frames(frames, [f"{name}, frame {index}" for index in indices])
    sizes = sorted({image.size for image in images})
    check(len(sizes) == 1, f"{name} has frames of different sizes {sizes}: resize them to one size.")
    metadata = VideoMetadata(total_num_frames=len(images), fps=fps or None, frames_indices=indices)
    return Video(torch.stack([torch.tensor(to_numpy_array(image)) for image in images]).numpy(), metadata)


def read_frames(frames: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """
    Reads frames as RGB PIL images. Frames that are arrays of the same type and shape are read together, because the
    range of their values is that of the whole video: a dark frame can have values up to 1 only.

    Args:
        frames (`Sequence`):
            The frames, in any form that [`~image_reading.read_images`] takes.
        names (`Sequence[str]`):
            Name of each frame in error messages.

    Raises:
        ValueError: If a frame cannot be read. The message names it.
    """
    if len({(type(frame), *_array_type(frame)) for frame in frames}) == 1 and _dimensions(frames[0]) in (2, 3):
        whole: Any = torch.stack(list(frames)) if is_torch_tensor(frames[0]) else to_numpy(list(frames))
        # A batch has channels.
        return _read_named([whole[..., None] if whole.ndim == 3 else whole], names[0])
    return [image for frame, name in zip(frames, names, strict=True) for image in _read_named([frame], name)]


def _array_type(frame: Any) -> tuple[Any, ...]:
    return () if _dimensions(frame) is None else (frame.dtype, *frame.shape)


def _read_named(images: list[Any], name: str) -> list[Any]:
    try:
        return read_images(images)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _read_file(file: str | bytes, name: str, sampling: Any) -> Decoded:
    """Returns some frames of a file, its frame rate, and the numbers of the frames."""
    shown = name if isinstance(file, bytes) else f"{name} ({file})"
    is_local = isinstance(file, bytes) or os.path.isfile(file)
    backend = next((name for name, found in (("pyav", is_av_available), ("opencv", is_cv2_available)) if found()), None)
    try:
        if is_local and is_animation(file):
            return decode_animation(file, sampling)
        if backend is None:
            raise ImportError(f"{shown} needs a package that decodes videos: run `pip install av`, or pass its frames.")
        if is_local and backend == "pyav":
            return decode_with_pyav(file, sampling)
        check(isinstance(file, str), "OpenCV only reads files: run `pip install av`.")
        return _load_video(file, backend, sampling)
    except ImportError:
        raise
    except Exception as error:  # decoders raise any type of error
        reason = str(error)
        if isinstance(file, str) and not is_local and "://" not in file:
            reason = "there is no such file."
        raise ValueError(f"{shown} cannot be read as a video: {reason}") from error


def _load_video(file: Any, backend: str, sampling: Any) -> Decoded:
    """Reads a video with Transformers: from a URL, or with OpenCV."""
    frames, metadata = load_video(file, backend=backend, sample_indices_fn=sampling.indices)
    indices = [int(index) for index in metadata.frames_indices]
    check(
        len(frames) == len(indices),
        f"only {len(frames)} of {len(indices)} frames can be decoded: the file is cut off, or it does not tell its "
        "number of frames, and then the package `av` can read it from a file.",
    )
    return list(frames), metadata.fps or None, indices


def metadata_of(video_metadata: Any, num_videos: int) -> list[Any]:
    """
    Returns the metadata of each video.

    Args:
        video_metadata (`Any`):
            `None`, the metadata of a video, or a list of them, one per video.
        num_videos (`int`):
            Number of videos.

    Raises:
        ValueError: If there are metadata for another number of videos.
    """
    if video_metadata is None:
        return [None] * num_videos
    listed = [video_metadata] if isinstance(video_metadata, Mapping) else list(video_metadata)
    listed = [item for entry in listed for item in (entry if isinstance(entry, (list, tuple)) else [entry])]
    check(
        len(listed) == num_videos,
        f"`video_metadata` must have one entry per video ({num_videos}), but has {len(listed)}.",
    )
    return listed
