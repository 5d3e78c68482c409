"""Evaluation: a model answers, and its answers are scored."""

from .baseline import BlindBaseline, blind_baseline
from .generation import generate_answers
from .scores import exact_match

__all__ = [
    "BlindBaseline",
    "blind_baseline",
    "exact_match",
    "generate_answers",
]
