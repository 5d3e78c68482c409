"""Evaluation: generates answers of a model, scores them, and compares them with a baseline without images."""

from .baseline import BlindBaseline, blind_baseline
from .generation import generate_answers
from .own_data import Evaluation, evaluate_rows
from .retrieval import embed, evaluate_retrieval
from .scores import exact_match, references_of, score_answers, score_rows

__all__ = [
    "BlindBaseline",
    "Evaluation",
    "blind_baseline",
    "embed",
    "evaluate_retrieval",
    "evaluate_rows",
    "exact_match",
    "generate_answers",
    "references_of",
    "score_answers",
    "score_rows",
]
