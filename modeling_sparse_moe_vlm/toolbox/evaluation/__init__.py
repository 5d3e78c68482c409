"""Evaluation: generates answers of a model, scores them, and compares them with a baseline without images."""

from .baseline import BlindBaseline, blind_baseline
from .generation import generate_answers
from .retrieval import embed, evaluate_retrieval
from .scores import exact_match, references_of, score_answers, score_rows

__all__ = [
    "BlindBaseline",
    "blind_baseline",
    "embed",
    "evaluate_retrieval",
    "exact_match",
    "generate_answers",
    "references_of",
    "score_answers",
    "score_rows",
]
