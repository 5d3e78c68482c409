"""Data: reads and validates data of many formats, and turns rows of conversations with images into batches."""

from .bad_rows import BadRowError
from .check import DataReport, check_data
from .collator import VisionLanguageCollator
from .loading import load_rows

__all__ = [
    "BadRowError",
    "DataReport",
    "VisionLanguageCollator",
    "check_data",
    "load_rows",
]
