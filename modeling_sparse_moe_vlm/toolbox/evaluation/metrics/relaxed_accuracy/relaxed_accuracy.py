"""The metric relaxed accuracy, as an `evaluate` module that is loaded from this folder without a download."""

import re
from collections.abc import Sequence
from fractions import Fraction

from modeling_sparse_moe_vlm.toolbox.evaluation import metric_modules

TOLERANCE = Fraction(5, 100)
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)\s*(%?)", re.ASCII | re.IGNORECASE)


class RelaxedAccuracy(metric_modules.AnswerMetric):
    """The relaxed accuracy of ChartQA, see the summary."""

    summary = """
The relaxed accuracy of ChartQA, in percent. A number is right if it differs from a reference by at most 5 percent of
the reference. Numbers with a percent sign are divided by 100, so that `5%` equals `0.05`. All other answers must equal
a reference, apart from case and surrounding white space.
"""
    urls = ("https://arxiv.org/abs/2203.10244",)

    @staticmethod
    def score_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Returns 100 for each prediction that is right, and 0 for the others."""
        return [
            100.0 * any(is_close(prediction, reference) for reference in given)
            for prediction, given in zip(predictions, references, strict=True)
        ]


def is_close(answer: str, reference: str) -> bool:
    """Whether an answer is right."""
    answer, reference = answer.strip(), reference.strip()
    number, expected = _number(answer), _number(reference)
    if number is None or expected is None:
        return answer.lower() == reference.lower()
    return abs(number - expected) <= TOLERANCE * abs(expected)


def _number(text: str) -> Fraction | None:
    """Returns the value of a number such as `-1.5`, `2e3` or `12%`, without rounding. Other texts have none."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    return Fraction(match[1]) / (100 if match[2] else 1)
