"""Data: reads and validates data of many formats, and turns rows of conversations with images into batches."""

from .bad_rows import BadRowError
from .check import DataReport, check_data
from .collator import VisionLanguageCollator
from .loading import load_rows
from .packing_check import check_packing
from .pairs import load_pairs
from .preferences import PreferenceCollator
from .retrieval import RetrievalCollator, retrieval_inputs

__all__ = [
    "BadRowError",
    "DataReport",
    "PreferenceCollator",
    "RetrievalCollator",
    "VisionLanguageCollator",
    "check_data",
    "check_packing",
    "load_pairs",
    "load_rows",
    "retrieval_inputs",
]
