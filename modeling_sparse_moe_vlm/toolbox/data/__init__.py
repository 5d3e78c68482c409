"""Conversations with images: from rows to batches."""

from .collator import VisionLanguageCollator

__all__ = [
    "VisionLanguageCollator",
]
