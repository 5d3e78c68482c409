"""The metric exact match, as an `evaluate` module that is loaded from this folder without a download."""

import datasets
import evaluate

_DESCRIPTION = """
The share of predictions that equal their reference, in percent. Differences in case, surrounding white space and a
final full stop are ignored.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Answers to score.
    references (`list[str]`): The right answers, one per prediction.

Returns:
    `dict[str, float]`: `exact_match`, from 0 to 100.
"""


class ExactMatch(evaluate.Metric):
    """The exact match of answers, see the description."""

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
    """Whether an answer equals its reference, apart from case, surrounding white space and a final full stop."""
    return _normalise(answer) == _normalise(reference)


def _normalise(answer: str) -> str:
    return answer.strip().removesuffix(".").strip().lower()
