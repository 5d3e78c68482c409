"""Exact match of answers, as an `evaluate` module that needs no download."""

import datasets
import evaluate

_DESCRIPTION = """
Share of predictions that equal their reference, in percent. Ignores case, surrounding white space and a final full
stop.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): The answers.
    references (`list[str]`): The right answers.

Returns:
    `dict[str, float]`: `exact_match`, between 0 and 100.
"""


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        hits = [is_right(a, b) for a, b in zip(predictions, references, strict=True)]
        return {"exact_match": 100.0 * sum(hits) / len(hits)}


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer equals its reference; ignores case, surrounding white space and a final full stop."""
    return _normalise(answer) == _normalise(reference)


def _normalise(answer: str) -> str:
    return answer.strip().removesuffix(".").strip().lower()
