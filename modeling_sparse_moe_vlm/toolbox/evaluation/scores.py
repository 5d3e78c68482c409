"""Scores of answers, computed by the `evaluate` modules in the folder `metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import evaluate

METRICS = Path(__file__).parent / "metrics"


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    Computes the share of answers that equal their reference. Differences in case, surrounding white space and a final
    full stop are ignored.

    Args:
        predictions (`Sequence[str]`):
            Answers to score.
        references (`Sequence[str]`):
            The right answers, one per prediction.

    Returns:
        `float`: The exact match in percent, from 0 to 100.

    Raises:
        ValueError: If there are no predictions, or if their number differs from the number of references.
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"got {len(predictions)} predictions for {len(references)} references: give one for each, and at least one."
        )
    metric = evaluate.load(str(METRICS / "exact_match"))
    return metric.compute(predictions=list(predictions), references=list(references))["exact_match"]
