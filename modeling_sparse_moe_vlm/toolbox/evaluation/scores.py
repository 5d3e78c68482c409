"""Scores of answers, by the `evaluate` modules in `metrics/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import evaluate

METRICS = Path(__file__).parent / "metrics"


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    Share of answers that equal their reference, in percent; ignores case, surrounding white space and a final full
    stop. The metric is an `evaluate` module under `metrics/`.

    Args:
        predictions (`Sequence[str]`):
            The answers.
        references (`Sequence[str]`):
            The right answers.

    Raises:
        ValueError: If there are no answers, or not as many as references.
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"got {len(predictions)} predictions for {len(references)} references: give one for each, and at least one."
        )
    metric = evaluate.load(str(METRICS / "exact_match"))
    return metric.compute(predictions=list(predictions), references=list(references))["exact_match"]
