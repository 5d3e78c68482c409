"""What the `evaluate` modules of this package share: inputs, the check of these inputs, and the mean over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import datasets
import evaluate

_INPUTS = """
Args:
    predictions (`list[str]`): Answers to score.
    references (`list[list[str]]` or `list[str]`): The right answers of each row, or one right answer per row.
"""


class AnswerMetric(evaluate.Metric):
    """
    A metric of answers that can have several references. It is the mean of the scores of its rows, unless a subclass
    overrides `_compute`.
    """

    summary = ""
    further_arguments = ""
    urls: tuple[str, ...] = ()

    # Takes predictions and references, and returns the score of each row.
    score_rows: ClassVar[Callable[..., list[float]]]

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description=_INPUTS + self.further_arguments,
            features=[
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
            reference_urls=list(self.urls),
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]] | list[str], **kwargs: Any
    ) -> dict[str, float]:
        scores = self.score_rows(predictions, as_lists(references), **kwargs)
        return {self.name: sum(scores) / len(scores)}


def as_lists(references: Sequence[Sequence[str]] | Sequence[str]) -> list[list[str]]:
    """
    Returns the references of each row as a list.

    Raises:
        ValueError: If a row has no references.
    """
    lists = [[given] if isinstance(given, str) else list(given) for given in references]
    for number, given in enumerate(lists):
        if not given:
            raise ValueError(f"row {number} has no references: give at least one right answer.")
    return lists
