"""Data: turns rows of conversations with images into batches."""

from .collator import VisionLanguageCollator

__all__ = [
    "VisionLanguageCollator",
]
