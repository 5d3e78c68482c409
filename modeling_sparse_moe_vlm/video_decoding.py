"""Decodes some frames of video files with PyAV, and of animations with Pillow."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from transformers.image_utils import PIL
from transformers.utils import is_av_available
from transformers.video_utils import VideoMetadata

from .checks import check

# Endings of files whose frames Pillow reads.
ANIMATIONS = (".gif", ".webp", ".png", ".apng")

# Frames, frame rate and the numbers of the frames in the whole video.
Decoded = tuple[list[Any], float | None, list[int]]


def is_animation(file: str | bytes) -> bool:
    """Returns whether Pillow reads a file: by the ending of its path, or by its first bytes."""
    if isinstance(file, bytes):
        return file.startswith((b"GIF8", b"\x89PNG")) or (file[:4] == b"RIFF" and file[8:12] == b"WEBP")
    return file.lower().endswith(ANIMATIONS)


def decode_animation(file: str | bytes, sampling: Any) -> Decoded:
    """
    Decodes some frames of an animation with Pillow.

    Args:
        file (`str` or `bytes`):
            Path of a file, or its bytes.
        sampling (`FrameSampling`):
            Which frames to decode.

    Returns:
        `tuple[list[PIL.Image.Image], float | None, list[int]]`: The frames, the frame rate if it is known, and the
        numbers of the frames.

    Raises:
        OSError, EOFError, SyntaxError, ValueError: If the file cannot be decoded.
    """
    with PIL.Image.open(BytesIO(file) if isinstance(file, bytes) else file) as animation:
        total = getattr(animation, "n_frames", 1)
        animation.load()  # some formats only have the duration of a frame after it was decoded
        duration = animation.info.get("duration")  # of a frame, in milliseconds
        fps = 1000 / duration if duration else None
        indices = sampling.indices(VideoMetadata(total_num_frames=total, fps=fps)).tolist()
        frames = []
        for index in indices:
            animation.seek(index)
            frames.append(animation.convert("RGBA"))
    return frames, fps, indices


def decode_with_pyav(file: str | bytes, sampling: Any) -> Decoded:
    """
    Decodes some frames of a video file with PyAV, rotated as a video player shows them. Unlike `load_video` of
    Transformers, it also reads files without a stored number of frames, such as WebM, and finds files that are
    cut off.

    Args:
        file (`str` or `bytes`):
            Path of a file, or its bytes.
        sampling (`FrameSampling`):
            Which frames to decode.

    Returns:
        `tuple[list[PIL.Image.Image], float | None, list[int]]`: The frames, the frame rate if it is known, and the
        numbers of the frames.

    Raises:
        ValueError: If the file has no video, no frames, or fewer frames than it should.
        Exception: What PyAV raises if it cannot decode the file.
    """
    # Transformers loads remote code without this package only if the import is below such a condition.
    if is_av_available():
        import av
    with av.open(BytesIO(file) if isinstance(file, bytes) else file) as container:
        check(bool(container.streams.video), "it contains no video.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else None
        total = stream.frames or _num_packets(container, stream)
        frames, indices, num_decoded = _decode(container, stream, total, fps, sampling)
        if len(frames) < len(indices):
            num_packets = _num_packets(container, stream)
            check(
                num_packets >= total and num_decoded > 0,
                f"it should have {total} frames, but only has {num_decoded}: the file is cut off.",
            )
            # Decoders leave out frames that are not to be shown, for example those that were cut in an editor.
            frames, indices, num_decoded = _decode(container, stream, num_decoded, fps, sampling)
    return frames, fps, indices


def _decode(
    container: Any, stream: Any, total: int, fps: float | None, sampling: Any
) -> tuple[list[Any], list[int], int]:
    """Returns the frames that were found, the numbers of the frames that were looked for, and how many were decoded."""
    check(total > 0, "it has no frames.")
    indices = [int(index) for index in sampling.indices(VideoMetadata(total_num_frames=total, fps=fps))]
    wanted, last = set(indices), indices[-1]
    frames = []
    num_decoded = 0
    container.seek(0)
    for frame in container.decode(stream):
        if num_decoded in wanted:
            image = frame.to_image()
            # Counterclockwise, in degrees.
            frames.append(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
        num_decoded += 1
        if num_decoded > last:
            break
    return frames, indices, num_decoded


def _num_packets(container: Any, stream: Any) -> int:
    """Returns the number of packets of a stream, one per frame, without decoding them."""
    container.seek(0)
    return sum(packet.size > 0 for packet in container.demux(stream))
