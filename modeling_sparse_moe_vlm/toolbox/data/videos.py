"""Gives the videos of conversations to a processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.video_utils import VideoMetadata

from ...processing_sparse_moe_vlm import SparseMoeVlmProcessor
from ...video_reading import read_video

# Keys under which a content part of type "video" may contain its video.
VIDEO_KEYS = ("video", "url", "path")

Conversations = list[list[dict[str, Any]]]


def takes_videos(processor: ProcessorMixin | PreTrainedTokenizerBase) -> bool:
    """Returns whether a processor has a video token."""
    return isinstance(processor, ProcessorMixin) and getattr(processor, "video_token", None) is not None


def read_videos(
    processor: ProcessorMixin | PreTrainedTokenizerBase, conversations: Conversations
) -> tuple[Conversations, dict[str, Any]]:
    """
    Reads the videos of conversations for a processor of Transformers, whose own processors only read some forms of
    videos. Its video processor chooses the frames. Our processor reads all forms itself.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            The processor.
        conversations (`list[list[dict]]`):
            The messages of each conversation, with videos in their parts.

    Returns:
        `tuple[list[list[dict]], dict]`: The conversations, with videos that the processor takes, and further arguments
        for it.

    Raises:
        ValueError: If the processor takes no videos, or if a video cannot be read.
        ImportError: If no package can decode a file.
    """
    # The class of a processor that was loaded with remote code is another one with the same name.
    if not _has_videos(conversations) or type(processor).__name__ == SparseMoeVlmProcessor.__name__:
        return conversations, {}
    if not takes_videos(processor):
        raise ValueError(f"there is a video, but {type(processor).__name__} takes no videos.")
    sampling = _OwnSampling(processor.video_processor)  # type: ignore[union-attr]
    metadata: list[VideoMetadata] = []
    read = []
    for messages in conversations:
        of_messages = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, list | tuple):
                content = [_read_part(part, sampling, metadata) for part in content]
            of_messages.append(message | {"content": content} if "content" in message else message)
        read.append(of_messages)
    return read, {"videos_kwargs": {"video_metadata": metadata, "do_sample_frames": False}}


def _has_videos(conversations: Conversations) -> bool:
    contents = [message.get("content") for messages in conversations for message in messages]
    return any(part["type"] == "video" for parts in contents if isinstance(parts, list | tuple) for part in parts)


def _read_part(part: dict[str, Any], sampling: _OwnSampling, metadata: list[VideoMetadata]) -> dict[str, Any]:
    source = next((part[key] for key in VIDEO_KEYS if part.get(key) is not None), None)
    if part["type"] != "video" or source is None:
        return part
    video = read_video(source, f"videos[{len(metadata)}]", sampling)
    metadata.append(video.metadata)
    return {key: value for key, value in part.items() if key not in VIDEO_KEYS} | {"video": video.frames}


@dataclass(frozen=True)
class _OwnSampling:
    """Chooses the frames of a video as a video processor of Transformers does."""

    video_processor: Any

    def indices(self, metadata: VideoMetadata, **kwargs: Any) -> Any:
        """Returns the numbers of the frames to read. Frames without a frame rate are all read."""
        names = self.video_processor.valid_kwargs.__annotations__
        options = {name: getattr(self.video_processor, name, None) for name in names}
        if not options.get("do_sample_frames") or metadata.fps is None:
            return np.arange(metadata.total_num_frames)
        return np.asarray(self.video_processor.sample_frames(metadata=metadata, **options))
